"""What DPO compares the policy with: the weights it started from, or the scores that these give.

"frozen" keeps a sharded copy of the weights and scores every batch twice. "precomputed" scores all steps of the run
before the first one and keeps the scores in WORKDIR: rows and noise are functions of the step, so they stay valid, and
neither training nor a resumed run holds a second model. The files say all that the scores depend on: before a run has
saved a step, scores of other settings are made anew; later they are refused. A LoRA run holds its base in any case,
which is the copy.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax.checkpoint import saver
from llada_jax.checkpoint.score_file import ScoreFile
from llada_jax.data.order import Batch, prefetch
from llada_jax.diffusion import schedule
from llada_jax.diffusion.preference import prepare, score
from llada_jax.diffusion.schedule import Phase
from llada_jax.evaluation.preference import pair_scores
from llada_jax.micro_batches import map_rows
from llada_jax.monitoring.metrics import duration
from llada_jax.runtime import distributed
from llada_jax.runtime.global_arrays import from_own_rows, on_all_devices, own_rows
from llada_jax.training.config import evaluation_block_sizes, execution, objective, preference
from llada_jax.training.inputs import Inputs, frozen_params
from llada_jax.training.save_policy import checkpoints

_PROGRESS_SECONDS = 10.0
# The sections and fields of the config that scores do not depend on, or that are resolved in what stands beside them
# (`_depends_on`). Everything else counts, whatever it is.
_WITHOUT_EFFECT = (
    "model", "stage", "alignment", "yarn_factor", "init_from", "compiled_step", "compiled_halves",
    "data.path", "data.mixture", "data.source", "data.patterns", "data.tokenizer", "data.cache", "data.corrupt_share",
    "batch.micro_batches", "schedule", "lora", "optimizer", "mesh", "checkpoint", "faults", "evaluation",
    "log_every_steps", "profile", "preference.enabled", "preference.beta", "preference.reference",
    "editing", "objective.group_blocks", "rl",  # a run of DPO has none (training.config.check_editing, check_rl)
    "objective.confidence_weight", "objective.confidence_temperature", "objective.embedding_noise_std",
    "objective.embedding_noise_steps", "execution.attention", "execution.experts", "execution.expert_parallel",
    "execution.remat", "execution.reduce_dtype",
)  # fmt: skip


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
    stage = preference(config)
    load = functools.cache(lambda: frozen_params(inputs, batch_sharding.mesh))
    if stage is None:
        return Reference(load() if inputs.lora or (config.rl.enabled and config.rl.kl_weight) else None)
    if config.preference.reference == "frozen":
        return Reference(load(), None, held_out_scores(config, inputs, load()))
    steps, held_out = _files(config, phases, inputs, stage.max_pairs, workdir)
    if not held_out.complete:
        held_out.append(held_out_scores(config, inputs, load()))
    if not steps.complete:
        _score_steps(config, phases, inputs, load(), batch_sharding, steps, stop)
    distributed.barrier()  # process 0 has written what all have scored
    if not steps.complete:
        print(f"stopped after scoring {steps.stored} steps: {workdir}", flush=True)
        return None
    return Reference(load() if inputs.lora else None, steps.read(), held_out.read()[0])


def held_out_scores(config: ConfigDict, inputs: Inputs, params) -> np.ndarray:
    """pair_scores of the held-out rows, with the same noise at every call."""
    mesh = jax.sharding.get_abstract_mesh()
    return pair_scores(
        params, inputs.model, inputs.held_out, evaluation_block_sizes(config)[-1],
        config.preference.max_pairs, draws=config.evaluation.preference_draws, rows_at_once=max(4, mesh.size),
        shared_noise=config.preference.shared_noise, block_origin=config.objective.block_origin,
        execution=execution(config),
    )  # fmt: skip


def _files(config, phases, inputs: Inputs, max_pairs: int, workdir: Path) -> tuple[ScoreFile, ScoreFile]:
    """(scores of all steps, scores of the held-out rows)"""
    of_steps = _depends_on(config, phases, inputs)
    of_held_out = of_steps | {
        "config.evaluation.block_sizes[-1]": evaluation_block_sizes(config)[-1],
        "config.evaluation.preference_draws": config.evaluation.preference_draws,
        "held-out rows": len(inputs.held_out.ids),
    }
    shape, held_out = (config.batch.rows, max_pairs, 2), (len(inputs.held_out.ids), max_pairs, 2)
    how = {"writes": jax.process_index() == 0, "replace": not saver.steps(checkpoints(config, workdir))}
    return distributed.in_turn(
        lambda: (
            ScoreFile(workdir / "reference_scores.bin", of_steps, shape, schedule.total_steps(phases), **how),
            ScoreFile(workdir / "reference_scores_held_out.bin", of_held_out, held_out, 1, **how),
        )
    )


def _depends_on(config: ConfigDict, phases: Sequence[Phase], inputs: Inputs) -> dict:
    """All that the reference's scores of the steps depend on, by name: its weights and the model as it is used, the
    rows, the noise, the objective and the arithmetic.
    """
    fields = jax.tree.leaves_with_path(json.loads(config.to_json()), is_leaf=lambda x: isinstance(x, list))
    named = ((jax.tree_util.keystr(path, simple=True, separator="."), value) for path, value in fields)
    counted = {
        f"config.{name}": value
        for name, value in named
        if not any(name == without or name.startswith(f"{without}.") for without in _WITHOUT_EFFECT)
    }
    defaults = {field.name: field.default for field in dataclasses.fields(inputs.model)}  # these are left out
    return {
        "weights of config.init_from": inputs.source.weights,
        "digest of the data": inputs.rows.digest,
        **{f"model.{name}": value for name, value in inputs.model.to_dict().items() if value != defaults.get(name)},
        **counted,
        "schedule": [[phase.block_size, phase.steps, phase.halves] for phase in phases],
    }


def _score_steps(config, phases, inputs: Inputs, weights, batch_sharding, file: ScoreFile, stop) -> None:
    """Appends the scores of the steps that `file` lacks, in the batches and with the noise of training."""
    dpo, noised_by, computed_by = preference(config), objective(config), execution(config)
    mesh = batch_sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, static_argnames="halves", out_shardings=replicated)
    def score_batch(weights, batch, block_size, halves):
        example = prepare(batch, config.seed, block_size, inputs.model, noised_by, dpo, halves)
        one = functools.partial(_score_part, weights, inputs.model, dpo.max_pairs, halves, computed_by)
        return map_rows(one, example, config.batch.micro_batches)

    last_step = schedule.total_steps(phases)
    first, begun, due = file.stored, time.monotonic(), 0.0
    print(f"scoring {last_step - first} of {last_step} steps by the reference", flush=True)
    mine = own_rows(batch_sharding, config.batch.rows)
    batches = prefetch(inputs.rows, first, last_step, config.batch.rows, which=mine)
    for step, batch in batches:
        phase = schedule.phase_at(phases, step)
        batch = from_own_rows(batch, batch_sharding, config.batch.rows)
        block_size = on_all_devices(np.int32(phase.block_size), mesh)
        file.append(jax.device_get(score_batch(weights, batch, block_size, phase.halves)))
        seconds = time.monotonic() - begun
        if seconds > due or step + 1 == last_step:
            due = seconds + _PROGRESS_SECONDS
            left = duration((last_step - step - 1) * seconds / (step + 1 - first))
            print(f"reference scores: step {step + 1}/{last_step}  {left} left", flush=True)
        if stop.after_step():
            batches.close()
            return


def _score_part(weights, model, max_pairs, halves, execution, part):
    return score(weights, model, part, max_pairs, halves, execution)
