"""What DPO compares the policy with: the weights it started from, or the scores that these give.

"frozen" keeps a sharded copy of the weights and scores every batch twice. "precomputed" scores all steps of the run
before the first one and keeps the scores in WORKDIR: rows and noise are functions of the step, so they stay valid, and
neither training nor a resumed run holds a second model. A LoRA run holds its base in any case, which is the copy.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax.data.order import Batch, prefetch
from llada_jax.diffusion import preference, schedule
from llada_jax.diffusion.schedule import Phase
from llada_jax.evaluation.preference import pair_scores
from llada_jax.training import config as settings
from llada_jax.training import hosts
from llada_jax.training.inputs import Inputs, frozen_params
from llada_jax.training.metrics import duration
from llada_jax.training.process_data import from_own_rows, on_all_devices, own_rows
from llada_jax.training.score_file import ScoreFile
from llada_jax.training.step import join_rows, split_rows

_PROGRESS_SECONDS = 10.0
# Fields of config.objective that scores do not depend on.
_WITHOUT_EFFECT = ("confidence_weight", "confidence_temperature", "embedding_noise_std", "embedding_noise_steps")


class Reference(NamedTuple):
    """frozen: the weights that do not train, or None where none is needed: LoRA's base, or the copy that DPO scores by;
    scores: float32 [steps, rows, max_pairs, 2], or None; held_out: the reference's pair_scores of the held-out rows,
    None in a run that is not DPO.
    """

    frozen: dict | None = None
    scores: np.ndarray | None = None
    held_out: np.ndarray | None = None

    def join(self, step: int, batch: Batch, rows: np.ndarray):
        """What the train step takes for a batch of these rows of the step."""
        return batch if self.scores is None else (batch, self.scores[step][rows])


def open_reference(
    config: ConfigDict, phases: Sequence[Phase], inputs: Inputs, batch_sharding, workdir: Path, stop
) -> Reference | None:
    """Loads or scores what is not in `workdir` yet; to be called while no other weights are on the devices.

    None when `stop.is_set` became true before all was scored; a later run goes on from there.
    Raises InputError when the scores in `workdir` are of other settings.
    """
    stage = settings.preference(config)
    load = functools.cache(lambda: frozen_params(inputs, batch_sharding.mesh))
    if stage is None:
        return Reference(load() if inputs.lora else None)
    if config.preference.reference == "frozen":
        return Reference(load(), None, held_out_scores(config, inputs, load()))
    steps, held_out = _files(config, phases, inputs, stage.max_pairs, workdir)
    if not held_out.complete:
        held_out.append(held_out_scores(config, inputs, load()))
    if not steps.complete:
        _score_steps(config, phases, inputs, load(), batch_sharding, steps, stop)
    hosts.barrier()  # process 0 has written what all have scored
    if not steps.complete:
        print(f"stopped after scoring {steps.stored} steps: {workdir}", flush=True)
        return None
    return Reference(load() if inputs.lora else None, steps.read(), held_out.read()[0])


def held_out_scores(config: ConfigDict, inputs: Inputs, params) -> np.ndarray:
    """pair_scores of the held-out rows, with the same noise at every call."""
    mesh = jax.sharding.get_abstract_mesh()
    return pair_scores(
        params, inputs.model, inputs.held_out, settings.evaluation_block_sizes(config)[-1],
        config.preference.max_pairs, draws=config.evaluation.preference_draws, rows_at_once=max(4, mesh.size),
        shared_noise=config.preference.shared_noise, block_origin=config.objective.block_origin,
        execution=settings.execution(config),
    )  # fmt: skip


def _files(config, phases, inputs: Inputs, max_pairs: int, workdir: Path) -> tuple[ScoreFile, ScoreFile]:
    """(scores of all steps, scores of the held-out rows)"""
    common = {
        "weights of config.init_from": inputs.source.weights,
        "alignment": inputs.model.alignment,
        "digest of the data": inputs.rows.digest,
        "config.data.held_out_rows": config.data.held_out_rows,
        "config.execution.dtype": config.execution.dtype,
        "config.preference.shared_noise": config.preference.shared_noise,
        "config.preference.max_pairs": max_pairs,
    }
    objective = {f"config.objective.{k}": v for k, v in config.objective.items() if k not in _WITHOUT_EFFECT}
    of_steps = common | objective | {
        "config.seed": config.seed,
        "config.batch.rows": config.batch.rows,
        "config.preference.draws": config.preference.draws,
        "schedule": [[phase.block_size, phase.steps, phase.halves] for phase in phases],
    }  # fmt: skip
    of_held_out = common | {
        "config.objective.block_origin": config.objective.block_origin,
        "config.evaluation.block_sizes[-1]": settings.evaluation_block_sizes(config)[-1],
        "config.evaluation.preference_draws": config.evaluation.preference_draws,
        "held-out rows": len(inputs.held_out.ids),
    }
    shape, held_out = (config.batch.rows, max_pairs, 2), (len(inputs.held_out.ids), max_pairs, 2)
    writes = jax.process_index() == 0
    return hosts.in_turn(
        lambda: (
            ScoreFile(workdir / "reference_scores.bin", of_steps, shape, schedule.total_steps(phases), writes),
            ScoreFile(workdir / "reference_scores_held_out.bin", of_held_out, held_out, 1, writes),
        )
    )


def _score_steps(config, phases, inputs: Inputs, weights, batch_sharding, file: ScoreFile, stop) -> None:
    """Appends the scores of the steps that `file` lacks, in the batches and with the noise of training."""
    stage, objective, execution = settings.preference(config), settings.objective(config), settings.execution(config)
    mesh = batch_sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, static_argnames="halves", out_shardings=replicated)
    def score(weights, batch, block_size, halves):
        example = preference.prepare(batch, config.seed, block_size, inputs.model, objective, stage, halves)
        parts = split_rows(example, config.batch.micro_batches)
        one = functools.partial(_score_part, weights, inputs.model, stage.max_pairs, halves, execution)
        return join_rows(jax.lax.map(one, parts))

    last_step = schedule.total_steps(phases)
    first, begun, due = file.stored, time.monotonic(), 0.0
    print(f"scoring {last_step - first} of {last_step} steps by the reference", flush=True)
    mine = own_rows(batch_sharding, config.batch.rows)
    batches = prefetch(inputs.rows, first, last_step, config.batch.rows, which=mine)
    for step, batch in batches:
        phase = schedule.phase_at(phases, step)
        batch = from_own_rows(batch, batch_sharding, config.batch.rows)
        block_size = on_all_devices(np.int32(phase.block_size), mesh)
        file.append(jax.device_get(score(weights, batch, block_size, phase.halves)))
        seconds = time.monotonic() - begun
        if seconds > due or step + 1 == last_step:
            due = seconds + _PROGRESS_SECONDS
            left = duration((last_step - step - 1) * seconds / (step + 1 - first))
            print(f"reference scores: step {step + 1}/{last_step}  {left} left", flush=True)
        if stop.after_step():
            batches.close()
            return


def _score_part(weights, model, max_pairs, halves, execution, part):
    return preference.score(weights, model, part, max_pairs, halves, execution)
