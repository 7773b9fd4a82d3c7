"""Training on rows of text: pre-training, SFT, CAP, editing and DPO. What a step of these is, and how it is judged.

Held-out measures are of the same rows and masks every time, so that differences between steps are paired.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from llada_jax.data.order import Batch, prefetch
from llada_jax.diffusion.schedule import Phase
from llada_jax.evaluation.likelihood import block_nelbo, weighted_mean
from llada_jax.evaluation.preference import chosen_only, compare
from llada_jax.evaluation.report import with_error
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.monitoring.metrics import MetricsWriter
from llada_jax.runtime.global_arrays import from_own_rows, on_all_devices, own_rows
from llada_jax.runtime.xla_options import xla_options
from llada_jax.tokenizer import Tokenizer
from llada_jax.training import compiled_step
from llada_jax.training.config import (
    evaluation_block_sizes,
    execution,
    objective,
    preference,
    ranking_block_size,
    skips_steps,
)
from llada_jax.training.inputs import Inputs
from llada_jax.training.reference import Reference, held_out_scores
from llada_jax.training.sections import TrainConfig
from llada_jax.training.step import Loss, denoising_loss, make_train_step, preference_loss
from llada_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A step is a batch of rows, one compiled program and its metrics. batch_sharding: of rows over the mesh."""

    config: TrainConfig
    inputs: Inputs
    reference: Reference
    train_step: Callable
    batch_sharding: jax.sharding.NamedSharding

    @functools.cached_property
    def _own_rows(self) -> np.ndarray:
        return own_rows(self.batch_sharding, self.config.batch.rows)

    def batches(self, first_step: int, last_step: int, offset: int) -> Iterator[tuple[int, Batch]]:
        """Yields (step, this process's rows of it); a generator. offset: rows that were skipped."""
        rows = self.config.batch.rows
        return prefetch(self.inputs.rows, first_step, last_step, rows, offset, self._own_rows)

    def step(
        self, state: TrainState, step: int, batch: Batch, phase: Phase, scalars: tuple[np.float32, ...]
    ) -> tuple[TrainState, dict]:
        """The state is donated. scalars: of FaultPolicy."""
        rows, noise_std = self.config.batch.rows, np.float32(_noise_std(self.config, step))
        scalars = np.int32(phase.block_size), noise_std, *scalars
        scalars = on_all_devices(scalars, self.batch_sharding.mesh)
        joined = self.reference.join(step, batch, self._own_rows)
        joined = from_own_rows(joined, self.batch_sharding, rows)
        with jax.transfer_guard("disallow"):
            return self.train_step(state, self.reference.frozen, joined, *scalars, phase.halves)

    def evaluate(self, params, writer: MetricsWriter, step: int) -> float:
        return evaluate(self.config, self.inputs, self.reference, params, writer, step)


def _noise_std(config: TrainConfig, step: int) -> float:
    c = config.objective
    return c.embedding_noise_std if step < c.embedding_noise_steps else 0.0


def open_train_step(config: TrainConfig, inputs: Inputs, optimizer, mesh) -> Callable:
    """make_train_step's function; where config.compiled_step has its program, that."""
    loss = train_loss(config, inputs.model, execution(config), inputs.tokenizer)
    options = xla_options(jax.default_backend())
    rate = config.optimizer.expert_bias_rate
    guard = skips_steps(config)
    train_step = make_train_step(inputs.trained, loss, optimizer, config.batch.micro_batches, rate, options, guard)
    if not config.compiled_step:
        return train_step
    made_for = compiled_step.identity(config, inputs.trained, mesh, config.compiled_halves)
    compiled = compiled_step.load(config.compiled_step, made_for, mesh.devices.flat)
    return lambda *arguments: (
        compiled(*arguments[:-1]) if arguments[-1] == config.compiled_halves else train_step(*arguments)
    )


def train_loss(
    config: ConfigDict, model: ModelConfig, execution: Execution, tokenizer: Tokenizer | None = None
) -> Loss:
    """What the stage of the config optimises. tokenizer: as in config.objective."""
    common = model, objective(config, tokenizer), execution, config.seed
    if (dpo := preference(config)) is None:
        return denoising_loss(*common, config.batch.micro_batches)
    return preference_loss(*common, dpo, config.preference.reference == "precomputed")


def evaluate(
    config: ConfigDict, inputs: Inputs, reference: Reference, params, writer: MetricsWriter, step: int
) -> float:
    """Writes and prints the NELBO at each block size, and for DPO how policy and reference compare on the pairs.

    Of a mixture the NELBO is the mean over components by their shares, with that of each beside it. Returns the NELBO
    by which checkpoints are ranked. Of pairs only the chosen answers count in it.
    """
    sizes = evaluation_block_sizes(config)
    rows = inputs.held_out
    if reference.held_out is not None:
        _compare(config, inputs, reference, params, writer, step, sizes[-1])
        rows = chosen_only(rows)
    mesh = jax.sharding.get_abstract_mesh()
    nelbo, texts = {}, []
    for block_size in sizes:
        estimates = {
            part.name: block_nelbo(
                params, inputs.model, jax.tree.map(lambda x, part=part: x[part.held_out], rows), block_size,
                samples=config.evaluation.samples, rows_at_once=max(4, mesh.size),
                block_origin=config.objective.block_origin, document_mask=config.objective.document_mask,
                execution=execution(config),
            )
            for part in inputs.components
        }  # fmt: skip
        estimate = weighted_mean(list(estimates.values()), [part.share for part in inputs.components])
        row = {"step": step, "block_size": block_size, "nelbo": estimate.nats, "nelbo_stderr": estimate.stderr}
        if len(estimates) > 1:
            row |= {f"nelbo/{name}": each.nats for name, each in estimates.items()}
            row |= {f"nelbo_stderr/{name}": each.stderr for name, each in estimates.items()}
        writer.write(row, f"held_out_block_{block_size}")
        texts.append(f"{block_size}: {with_error(estimate.nats, estimate.stderr, '.3f')}")
        nelbo[block_size] = estimate.nats
    print(f"step {step}  held-out NELBO, nats per token, by block size  " + "   ".join(texts), flush=True)
    return nelbo[ranking_block_size(config)]


def _compare(config, inputs: Inputs, reference: Reference, params, writer, step: int, block_size: int) -> None:
    policy = held_out_scores(config, inputs, params)
    comparison = compare(policy, reference.held_out, inputs.held_out.segment_ids, config.preference.beta)
    row = {f"preference_{name}": value for name, value in dataclasses.asdict(comparison).items()}
    writer.write({"step": step, "block_size": block_size} | row, "held_out_preference")
    print(f"step {step}  held-out preference  {comparison.describe()}", flush=True)
