"""What a training step does beside the gradients, which tests/test_sharding.py compares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.forward import Execution
from llada_jax.training import train_state
from llada_jax.training.config import check, default_config
from llada_jax.training.step import denoising_loss, make_train_step
from tests.test_sharding import MODELS, batch_of


def test_loss_free_balancing_moves_the_bias_by_the_load_and_by_nothing_else():
    model = MODELS["tiny_moe"]
    optimizer = optax.sgd(1e-3)
    step = make_train_step(
        model, denoising_loss(model, Objective(), Execution(), seed=0), optimizer, expert_bias_rate=1e-3
    )
    state = train_state.create(parameters.initialize(model, jax.random.key(0)), optimizer)
    state, metrics = step(state, None, batch_of(model), jnp.int32(8), jnp.float32(0), "both")
    (bias,) = np.asarray(state.params["sparse"]["expert_bias"])
    assert 1 < metrics["expert_load_mean"] == metrics["expert_load_max"] <= model.num_experts
    # Two or three levels 1e-3 apart, by the sign of each expert's load less the mean, and no mean.
    levels = np.unique(np.round(bias / 1e-3, 3))
    assert 2 <= len(levels) <= 3 and levels[-1] - levels[0] == pytest.approx(2, abs=2e-3)
    assert abs(bias.mean()) < 1e-8


def test_rows_of_padding_alone_have_metrics_that_are_numbers_and_move_no_bias():
    model, optimizer = MODELS["tiny_moe"], optax.sgd(1e-3)
    loss = denoising_loss(model, Objective(), Execution(), seed=0)
    step = make_train_step(model, loss, optimizer, expert_bias_rate=1e-3)
    batch = batch_of(model)
    batch = batch.replace(segment_ids=np.zeros_like(batch.segment_ids))
    state = train_state.create(parameters.initialize(model, jax.random.key(0)), optimizer)
    state, metrics = step(state, None, batch, jnp.int32(8), jnp.float32(0), "both")
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["expert_load_max"] == 0
    assert not np.asarray(state.params["sparse"]["expert_bias"]).any()


def test_balancing_is_refused_where_no_router_has_a_bias():
    config = default_config("tiny")
    config.optimizer.expert_bias_rate = 1e-3
    with pytest.raises(InputError, match="expert_bias_rate=0.001, expected 0"):
        check(config)
