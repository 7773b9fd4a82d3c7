"""When a run saves what it has: every so many steps or minutes, and again when the store has failed.

A save runs in the background, from host copies that end with it. One that fails is therefore not repeated as it was:
the state of a later step is saved, until that has failed too often in a row. The steps that are there already stay.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from llada_jax.checkpoint import saver
from llada_jax.errors import InputError
from llada_jax.runtime.retry import Retry
from llada_jax.training.config import ranking_block_size
from llada_jax.training.inputs import Inputs, lineage
from llada_jax.training.train_state import TrainState


def checkpoints(config: ConfigDict, workdir: Path) -> str | Path:
    """The folder of the steps of a run."""
    return config.checkpoint.directory or workdir / "checkpoints"


class SavePolicy:
    """Saves steps of a run under config.checkpoint."""

    def __init__(self, config: ConfigDict, workdir: Path, inputs: Inputs, retry: Retry):
        self._every_minutes, self._retry = config.checkpoint.every_minutes, retry
        self._directory, self._inputs = checkpoints(config, workdir), inputs
        policy = config.checkpoint
        scored_by = {
            "block_size": ranking_block_size(config),
            "samples": config.evaluation.samples,
            "block_origin": config.objective.block_origin,
            "document_mask": config.objective.document_mask,
            "rows": inputs.num_held_out,
            "data": inputs.rows.digest,
        }
        self._saver = saver.Saver(
            self._directory, policy.keep_last or 0, policy.keep_best, policy.keep_every or 0, scored_by
        )
        self._lineage = lineage(config, inputs)
        self._init_weights = None if inputs.source is None else inputs.source.weights
        self._begun = time.monotonic()  # the last save
        self._failures = 0  # in a row
        self._failed_at: float | None = None
        self._last = None  # arguments of the last save

    def due(self) -> bool:
        """Whether a step should be saved whatever its number: config.checkpoint.every_minutes have passed since the
        last save, or that has failed and it is time for another. Of this process alone: `due_anywhere` is of all.
        """
        now = time.monotonic()  # not a wall clock, which may be set
        if self._failed_at is None and self._saver.failed:
            self._failed_at = now
        if self._failed_at is not None:
            return now - self._failed_at >= self._retry.pause(self._failures + 1)
        return self._every_minutes is not None and now - self._begun >= 60 * self._every_minutes

    def due_anywhere(self, ask: bool) -> bool:
        """Whether a process is due, the same on all of them. Several find that out only when they `ask`: it takes a
        collective.
        """
        if jax.process_count() == 1:
            return self.due()
        return ask and bool(np.any(multihost_utils.process_allgather(np.array(self.due()))))

    def save(self, step: int, state: TrainState, score: float | None, host_state: dict) -> None:
        """Starts to save `state`. Raises InputError when the last saves have all failed, too many of them."""
        self.settle()
        self._last = step, state, score, host_state
        self._start()

    def wait(self) -> None:
        """Returns when the last state that was given to save() is saved; it must not have been donated since.

        Raises InputError as `save` does.
        """
        while not self.settle():
            time.sleep(self._retry.pause(self._failures))
            self._start()

    def _start(self) -> None:
        step, state, score, host_state = self._last
        host_state = {"step": step, "init_weights": self._init_weights} | host_state
        tokenizer = self._inputs.tokenizer
        self._begun, self._failed_at = time.monotonic(), None
        self._saver.save(
            step, state.params, state.optimizer, host_state, self._inputs.trained,
            {} if tokenizer is None else tokenizer.files, self._lineage, score,
        )  # fmt: skip

    def settle(self) -> bool:
        """Waits for the save that has begun; whether it went well. Raises InputError as `save` does."""
        try:
            self._saver.wait()
        except Exception as error:  # of a store: OSError, tensorstore's ValueError, another process's
            self._failures += 1
            steps = saver.steps(self._directory)
            text = (
                f"{self._directory}: step {self._last[0]} could not be saved ({' '.join(str(error).split())[:300]}); "
                + (f"the newest good step is {steps[-1]}" if steps else "there is no good step yet")
            )
            if self._failures > self._retry.retries:
                raise InputError(f"{text}; given up after {self._failures} saves that failed in a row") from error
            print(f"{text}; trying again", file=sys.stderr, flush=True)
            return False
        self._failures = 0
        return True
