"""One optimizer step: noise, forward, backward, clip, AdamW, as one compiled program per kind of pass.

What a stage optimises is a `Loss`: four pure functions. The step itself is the same for all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llada_jax import sharding
from llada_jax.diffusion import noise, objectives, preference
from llada_jax.diffusion.drafts import draft
from llada_jax.diffusion.objectives import Objective
from llada_jax.diffusion.preference import Preference
from llada_jax.micro_batches import map_rows, sum_over_rows
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.lora import Lora, attach
from llada_jax.model.router import balanced_bias
from llada_jax.training.train_state import TrainState

_RECENT = 16  # losses, optimizers and steps that a process keeps: equal settings are one object, traced once


class Loss(NamedTuple):
    """prepare(batch, block_size, halves) -> example, rows leading. total(example): what sums are divided by.
    value(params, reference, example, total, noise_std, halves) -> (loss, sums): of a micro-batch; the losses and the
    sums of micro-batches add up. metrics(sums, total) -> {name: scalar}. draft(params, example, halves) -> example:
    passes without gradient before all that; None: there are none.
    """

    prepare: Callable
    total: Callable
    value: Callable
    metrics: Callable
    draft: Callable | None = None


def make_train_step(
    model: ModelConfig | Lora,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    expert_bias_rate: float = 0.0,
    compiler_options: dict[str, str] | None = None,
    guard: bool = False,
):
    """Returns the jitted train_step(state, frozen, batch, block_size, embedding_noise_std, halves): for equal arguments
    the same function, so that the runs of a process share its programs.

    It returns (state, metrics), metrics being float32 scalars. model: what trains, the model's weights or its adapters.
    frozen: weights that do not: the adapters' base, which is also the loss's reference; without adapters the reference,
    or None when the loss needs none. batch: data.order.Batch of arrays; block_size int32 and embedding_noise_std
    float32 are run-time scalars; halves (schedule.Phase.halves) is static. The state is donated. expert_bias_rate: of
    router.balanced_bias; 0 leaves the bias as it is; else the loss must be a denoising_loss and the model have one.
    compiler_options: of XLA (runtime.xla_options.py). guard: the step is a `guarded` one, with one more argument.
    """
    options = None if compiler_options is None else tuple(compiler_options.items())
    return _make_train_step(model, loss, optimizer, micro_batches, expert_bias_rate, options, guard)


@functools.lru_cache(maxsize=_RECENT)
def _make_train_step(model, loss, optimizer, micro_batches, expert_bias_rate, compiler_options, guard):
    config = model.model if isinstance(model, Lora) else model

    def train_step(state: TrainState, frozen, batch, block_size, embedding_noise_std, halves):
        example = loss.prepare(batch, block_size, halves)
        if loss.draft is not None:
            example = loss.draft(whole(state.params, frozen, model), example, halves)
        total = loss.total(example)

        def gradient(params, example):
            def value(params):
                return loss.value(whole(params, frozen, model), frozen, example, total, embedding_noise_std, halves)

            return jax.grad(value, has_aux=True)(params)

        gradients, sums = sum_over_rows(functools.partial(gradient, state.params), example, micro_batches)
        gradients = jax.tree.map(sharding.constrain, gradients, parameters.logical_axes(model))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if expert_bias_rate:
            bias = balanced_bias(params["sparse"]["expert_bias"], sums.expert_load, expert_bias_rate)
            params["sparse"] = params["sparse"] | {"expert_bias": bias}
        metrics = loss.metrics(sums, total) | {"gradient_norm": optax.global_norm(gradients)}
        metrics["corrupt_rows"] = _rows_without_document(batch)
        if config.mask_token_id is not None:  # near zero after AR training; Section 7.1 watches it
            embedding = whole(params, frozen, model)["embedding"]
            metrics["mask_embedding_norm"] = jnp.linalg.norm(embedding[config.mask_token_id].astype(jnp.float32))
        return TrainState(state.step + 1, params, optimizer_state), metrics

    step = guarded(train_step) if guard else train_step
    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(step, static_argnames="halves", donate_argnums=0, compiler_options=options)


def guarded(train_step: Callable) -> Callable:
    """guarded_step(..., embedding_noise_std, largest_loss, halves).

    Where the loss or the gradient is not finite, or the loss exceeds `largest_loss` (float32), weights and optimizer
    stay as they were; `step` counts on, and the metrics are those of the update that was not made. The optimizer's own
    count, and with it the learning rate, stays behind.
    """

    def guarded_step(state: TrainState, frozen, batch, block_size, embedding_noise_std, largest_loss, halves):
        new, metrics = train_step(state, frozen, batch, block_size, embedding_noise_std, halves)
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= largest_loss)
        applied = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
        return applied.replace(step=new.step), metrics

    return guarded_step


def whole(params, frozen, model: ModelConfig | Lora):
    """The weights of the forward pass: those that train, or the frozen base with the adapters that train."""
    return attach(frozen, params, model) if isinstance(model, Lora) else params


def _rows_without_document(batch) -> jax.Array:
    """How many rows of the batch are those that data.order reads for corrupt ones."""
    rows = batch[0] if isinstance(batch, tuple) else batch
    return (rows.segment_ids == 0).all(axis=1).sum().astype(jnp.float32)


@functools.lru_cache(maxsize=_RECENT)
def denoising_loss(
    model: ModelConfig, objective: Objective, execution: Execution, seed: int, micro_batches: int = 1
) -> Loss:
    """BDLM, MDLM, AR, SFT, CAP (diffusion/objectives.py) and editing (diffusion/editing.py).

    With micro-batches, the confidence term that is optimised is the mean of their means, not the mean over the batch:
    the number of correct tokens of the batch is known only after the forward passes of all of them, and dividing
    exactly would take a second one. The loss that is reported has the mean over the batch.
    """
    temperature = objective.confidence_temperature if objective.confidence_weight else None
    # The confidence term is a mean over a micro-batch: its parts add up to the mean over micro-batches.
    part = dataclasses.replace(objective, confidence_weight=objective.confidence_weight / micro_batches)

    def prepare(batch, block_size, halves):
        keys = noise.example_keys(seed, batch.row_ids, batch.epochs)
        return objectives.prepare_batch(batch, keys, block_size, model, objective, halves)

    def draft_all(params, example, halves):
        if halves == "clean":
            return example
        of_rows = functools.partial(draft, params, model, objective=objective, halves=halves, execution=execution)
        drafted = map_rows(of_rows, example, micro_batches)
        return objectives.weighted(drafted, model, objective)

    def value(params, reference, example, total, noise_std, halves):
        sums, _ = objectives.score(params, model, example, halves, execution, noise_std, temperature)
        return objectives.loss(sums, total, part), sums

    def metrics(sums: objectives.Sums, total):
        masked = jnp.maximum(sums.masked, 1)
        named = {
            "loss": objectives.loss(sums, total, objective),
            "masked_nll": sums.nll / masked,
            "masked_accuracy": sums.correct / masked,
            "masked_share": sums.masked / jnp.maximum(sums.eligible, 1),
        }
        if temperature is not None:
            named["correct_entropy"] = sums.correct_entropy / jnp.maximum(sums.correct, 1)
        if objective.editing.weight:
            named |= {
                "unmasked_nll": sums.unmasked_nll / jnp.maximum(sums.wrong + sums.right, 1),
                "wrong_share": sums.wrong / jnp.maximum(sums.eligible, 1),
                "wrong_accuracy": sums.wrong_correct / jnp.maximum(sums.wrong, 1),
                "right_accuracy": sums.right_correct / jnp.maximum(sums.right, 1),
            }
        if sums.expert_load is not None:  # 1 is balanced: of each layer, the busiest expert's tokens over the mean
            busiest = sums.expert_load.max(axis=1) / jnp.maximum(sums.expert_load.mean(axis=1), 1e-6)  # no token: 0
            named |= {"expert_load_mean": busiest.mean(), "expert_load_max": busiest.max()}
        return named

    total = functools.partial(objectives.normalizer, objective=objective)
    return Loss(prepare, total, value, metrics, draft_all if objective.editing.drafts else None)


class PreferenceExample(NamedTuple):
    """noised: of preference.prepare; reference: precomputed scores float32 [rows, max_pairs, 2], or None."""

    noised: objectives.Example
    reference: jax.Array | None


@functools.lru_cache(maxsize=_RECENT)
def preference_loss(
    model: ModelConfig, objective: Objective, execution: Execution, seed: int, settings: Preference, precomputed=False
) -> Loss:
    """DPO (diffusion/preference.py). precomputed: `prepare` takes (batch, the reference's scores of it), and `value`
    no weights of a reference.
    """

    def prepare(batch, block_size, halves):
        batch, reference = batch if precomputed else (batch, None)
        noised = preference.prepare(batch, seed, block_size, model, objective, settings, halves)
        return PreferenceExample(noised, reference)

    def scores(params, example, halves):
        return preference.score(params, model, example.noised, settings.max_pairs, halves, execution)

    def present(example):
        return preference.pairs_present(example.noised.segment_ids[:, 0], settings.max_pairs)

    def value(params, reference, example, total, noise_std, halves):
        policy = scores(params, example, halves)
        frozen = example.reference if precomputed else jax.lax.stop_gradient(scores(reference, example, halves))
        sums = preference.preference_loss(policy, frozen, present(example), settings.beta)
        return sums.loss / total, sums

    def metrics(sums: preference.PreferenceSums, total):
        mean = sums.difference / total
        return {
            "loss": sums.loss / total,
            "preference_accuracy": sums.correct / total,
            "margin": settings.beta * mean,
            "difference_variance": sums.squared_difference / total - mean**2,
        }

    return Loss(prepare, lambda example: jnp.maximum(present(example).sum(), 1).astype(jnp.float32), value, metrics)
