"""What a run does about a bad step: a loss or gradient that is not finite, or a loss far above its level (a spike).

stop    the run ends with one line; its checkpoints are from before
skip    the update is not applied, which the compiled step itself decides (step.guarded); the next step goes on
rewind  the newest checkpoint is loaded and the order of the data moved on, so that no row that was met since, up to
        the bad step's, is met again in this epoch (as PaLM did, arXiv 2204.02311 5.1)

Whether a step was bad is read while the next one runs, so the devices never wait. Every decision is a function of the
losses of the run and of what its checkpoints hold: a run that is killed and resumed decides as it would have done.
Each bad step is a line of WORKDIR/faults.jsonl: {"step", "reason", "action", "loss", "gradient_norm", "row_ids"}, with
null for what is not finite, and the stored indices of its rows.
"""

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from llada_jax.diffusion.schedule import Phase, phase_at, total_steps
from llada_jax.errors import InputError
from llada_jax.training.config import skips_steps

FILE = "faults.jsonl"


class FaultPolicy:
    """Judges the steps of a run by config.faults; every process of it comes to the same decisions.

    host: what the checkpoint that the run goes on from keeps of host_state(), {} at the start.

    Attributes: `data_offset`, by which the rows of a step are moved on, as rewinds pass over rows and steps of another
    batch.rows have used more or fewer (then it may be negative); `skipped`, steps without an update.
    """

    def __init__(self, config: ConfigDict, phases: Sequence[Phase], workdir: Path, host: dict):
        self._faults, self._rows_per_step, self._phases, self._workdir = (
            config.faults,
            config.batch.rows,
            phases,
            workdir,
        )
        saved = host.get("faults", {})
        self.data_offset: int = _continued(host, self._rows_per_step, total_steps(phases))
        self.skipped: int = saved.get("skipped", 0)
        self._rewinds: int = saved.get("rewinds", 0)
        self._losses = deque(map(tuple, saved.get("losses", [])), maxlen=config.faults.spike_window + 1)
        self._pending: deque = deque()
        self._guarded = skips_steps(config)

    def host_state(self) -> dict:
        """What a checkpoint has to keep, as JSON can hold it."""
        faults = {"skipped": self.skipped, "rewinds": self._rewinds, "losses": [list(each) for each in self._losses]}
        return {"data_offset": self.data_offset, "rows_per_step": self._rows_per_step, "faults": faults}

    def scalars(self, step: int) -> tuple[np.float32, ...]:
        """What a guarded step takes beside the others: the loss above which it is not applied. Nothing for others."""
        if not self._guarded:
            return ()
        return (self._limit(step) if self._faults.on_spike == "skip" else np.float32(np.inf),)

    def observe(self, step: int, metrics: dict, row_ids: np.ndarray, now: bool) -> int | None:
        """Takes what a step (from 0) returned; judges the step before it and, if `now`, the step itself.

        row_ids: stored indices of this process's rows. Returns the bad step that the run is to be rewound for, or None.
        Raises InputError when the run is to stop.
        """
        self._pending.append((step, metrics, row_ids))
        while len(self._pending) > (0 if now else 1):
            if self._is_rewound(*(oldest := self._pending.popleft())):
                return oldest[0]
        return None

    def rewound(self, bad_step: int, to_step: int, host: dict) -> dict:
        """The host state with which the run goes on from `to_step`, of whose checkpoint `host` is: with the rows behind
        those of `bad_step`.
        """
        offset = self.data_offset + (bad_step + 1 - to_step) * self._rows_per_step
        moved = {"data_offset": offset, "rows_per_step": self._rows_per_step}
        return host | moved | {"faults": host.get("faults", {}) | {"rewinds": self._rewinds}}

    def _is_rewound(self, step: int, metrics: dict, row_ids: np.ndarray) -> bool:
        loss, norm = (float(x) for x in jax.device_get((metrics["loss"], metrics["gradient_norm"])))
        reason, policy = self._fault(step, loss, norm)
        if reason is None:
            if self._faults.spike_factor is not None:
                self._losses.append((step, loss))
            return False
        self._write_down(step, reason, policy, loss, norm, row_ids)
        if policy == "stop":
            raise InputError(f"step {step + 1}: {reason}; lower optimizer.learning_rate, or see config.faults")
        self.skipped += policy == "skip"
        self._rewinds += policy == "rewind"
        for done, field in ((self.skipped, "max_skips"), (self._rewinds, "max_rewinds")):
            if done > getattr(self._faults, field):
                raise InputError(
                    f"step {step + 1}: {reason}, after config.faults.{field}={getattr(self._faults, field)} others"
                )
        return policy == "rewind"

    def _fault(self, step: int, loss: float, norm: float) -> tuple[str | None, str]:
        """(what is wrong or None, the policy that it meets)"""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}", self._faults.on_nonfinite
        if loss > (limit := self._limit(step)):
            level = limit / self._faults.spike_factor
            return f"the loss is {loss:.4g}, its level {level:.4g}", self._faults.on_spike
        return None, ""

    def _limit(self, step: int) -> np.float32:
        """The loss above which a step is a spike: spike_factor times the median of the last good losses of its phase.

        The step before is left out, as it still runs when this one begins.
        """
        phase, window = phase_at(self._phases, step), self._faults.spike_window
        alike = [loss for s, loss in self._losses if s < step - 1 and _alike(phase_at(self._phases, s), phase)]
        if self._faults.spike_factor is None or len(alike) < window:
            return np.float32(np.inf)
        return np.float32(self._faults.spike_factor * np.median(alike[-window:]))

    def _write_down(self, step: int, reason: str, policy: str, loss: float, norm: float, row_ids: np.ndarray) -> None:
        if jax.process_count() > 1:
            row_ids = np.unique(multihost_utils.process_allgather(row_ids))
        finite = {
            name: value if math.isfinite(value) else None for name, value in (("loss", loss), ("gradient_norm", norm))
        }
        entry = {"step": step + 1, "reason": reason, "action": policy, **finite, "row_ids": row_ids.tolist()}
        if jax.process_index() == 0:
            print(f"step {step + 1}: {reason}; {policy}; its rows are in {self._workdir / FILE}", flush=True)
            _append(self._workdir / FILE, json.dumps(entry))


def _continued(host: dict, rows_per_step: int, last_step: int) -> int:
    """The data_offset with which steps of `rows_per_step` rows go on behind the rows that the checkpoint has used.

    Step s reads data_offset + s * rows_per_step + i (data/order.py). A host state that does not say how many rows a
    step had is taken for one of as many; one that names no step may be of any of the schedule: rows may then be passed
    over, but none is met twice.
    """
    offset, before = host.get("data_offset", 0), host.get("rows_per_step", rows_per_step)
    if before == rows_per_step:
        return offset
    step = host.get("step", last_step if before > rows_per_step else 0)
    return offset + step * (before - rows_per_step)


def _alike(a: Phase, b: Phase) -> bool:
    return (a.name, a.block_size) == (b.name, b.block_size)


def _append(path: Path, line: str) -> None:
    """Appends the line unless it is there already: a resumed run meets the same fault again."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if line in text.splitlines():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * (text != "" and not text.endswith("\n")) + line + "\n")  # behind what a kill cut off
        file.flush()
        os.fsync(file.fileno())
