"""One optimizer step: noise, forward, backward, clip, AdamW, as one compiled program per kind of pass."""

import functools

import jax
import jax.numpy as jnp
import optax

from llada_jax.diffusion import noise, objectives
from llada_jax.diffusion.objectives import Objective
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.training.state import TrainState


def make_train_step(
    model: ModelConfig,
    objective: Objective,
    execution: Execution,
    optimizer: optax.GradientTransformation,
    seed: int,
    micro_batches: int = 1,
):
    """Returns the jitted train_step(state, batch, block_size, embedding_noise_std, halves) -> (state, metrics).

    batch: data.order.Batch of arrays; block_size int32 and embedding_noise_std float32 are run-time scalars; halves
    (schedule.Phase.halves) is static. The state is donated. metrics: float32 scalars.
    """

    def loss(params, example, total, noise_std, halves):
        sums, _ = objectives.score(params, model, example, halves, execution, noise_std)
        return sums.weighted / total, sums

    def train_step(state: TrainState, batch, block_size, embedding_noise_std, halves):
        keys = noise.example_keys(seed, batch.row_ids, batch.epochs)
        example = objectives.prepare(
            batch.ids, batch.segment_ids, batch.supervised, keys, block_size, model, objective, halves
        )
        gradient = functools.partial(
            jax.grad(loss, has_aux=True), total=objectives.normalizer(example, objective),
            noise_std=embedding_noise_std, halves=halves,
        )  # fmt: skip
        gradients, sums = _accumulate(gradient, state.params, example, micro_batches)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = _metrics(model, params, sums, gradients, objectives.normalizer(example, objective))
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return jax.jit(train_step, static_argnames="halves", donate_argnums=0)


def _accumulate(gradient, params, example, micro_batches: int):
    """Sums gradients over micro-batches of rows, one after the other, in float32."""
    if micro_batches == 1:
        return gradient(params, example)

    def split(x):  # every micro-batch takes rows of every shard of the batch
        return jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)

    def one(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    # The sums start as zeros of the shapes that `gradient` returns.
    parts = jax.tree.map(split, example)
    first = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(one, zeros, parts)[0]


def _metrics(model, params, sums: objectives.Sums, gradients, total):
    supervised = jnp.maximum(sums.supervised, 1)
    metrics = {
        "loss": sums.weighted / total,
        "masked_nll": sums.nll / supervised,
        "masked_accuracy": sums.correct / supervised,
        "masked_share": sums.supervised / jnp.maximum(sums.eligible, 1),
        "gradient_norm": optax.global_norm(gradients),
    }
    if model.mask_token_id is not None:  # near zero after AR training; Section 7.1 watches it
        metrics["mask_embedding_norm"] = jnp.linalg.norm(params["embedding"][model.mask_token_id])
    return metrics
