"""AdamW with a warm-up, stable, decay learning rate."""

import dataclasses
import functools

import jax
import optax
from ml_collections import ConfigDict

from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.training.sections import OptimizerConfig


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up, constant, linear decay over the last decay_steps: the last step of the warm-up has learning_rate,
    the last of all learning_rate * end_fraction. decay_steps 0: no decay. learning_rate None: 0 throughout, for a
    program that is compiled and not run; a run has the rate of source.continue_learning_rate.
    """
    peak = config.learning_rate or 0.0
    warmup = min(config.warmup_steps, total_steps)
    decay = min(config.decay_steps, total_steps - warmup)
    end = peak * config.end_fraction
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak + (end - peak) / max(decay, 1), end, max(decay - 1, 1)),
        ],
        [warmup, total_steps - decay],
    )


def make_optimizer(config: ConfigDict, model: ModelConfig | Lora, total_steps: int) -> optax.GradientTransformation:
    """Clipped AdamW; norms and biases are not decayed. Weights that are not trainable have no gradient and no decay,
    so they stay as they are. Equal arguments give the same object (step.make_train_step).
    """
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(OptimizerConfig)}
    return _make_optimizer(OptimizerConfig(**settings), model, total_steps)


@functools.lru_cache(maxsize=16)
def _make_optimizer(config: OptimizerConfig, model, total_steps: int) -> optax.GradientTransformation:
    decayed = jax.tree.map(lambda a, b: a and b, parameters.decayed(model), parameters.trainable(model))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
    )
