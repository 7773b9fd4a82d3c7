"""What a training step does beside the gradients, which tests/test_sharding.py compares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.diffusion.objectives import Objective
from llada_jax.diffusion.preference import Preference, PreferenceSums
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.forward import Execution
from llada_jax.training import train_state
from llada_jax.training.config import check, default_config
from llada_jax.training.step import denoising_loss, guarded, make_train_step, preference_loss
from tests.test_sharding import MODELS, batch_of


def test_loss_free_balancing_moves_the_bias_by_the_load_and_by_nothing_else():
    model = MODELS["tiny_moe"].replace(num_layers=1)
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


@pytest.mark.parametrize(
    "loss, norm, moves", [(1.0, 1.0, 1), (2.0, 1.0, 1), (2.1, 1.0, 0), (np.nan, 1.0, 0), (1.0, np.inf, 0)]
)
def test_a_guarded_step_leaves_all_but_the_count_as_it_was_where_the_step_is_bad(loss, norm, moves):
    def train_step(state, *others):
        new = train_state.TrainState(state.step + 1, {"w": jnp.ones(2)}, {"moment": jnp.ones(2)})
        return new, {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(norm)}

    old = train_state.TrainState(jnp.int32(3), {"w": jnp.zeros(2)}, {"moment": jnp.zeros(2)})
    new, _ = guarded(train_step)(old, None, None, None, None, jnp.float32(2.0), "both")
    assert new.step == 4
    assert [np.asarray(x).tolist() for x in jax.tree.leaves((new.params, new.optimizer))] == [[moves, moves]] * 2


def test_metrics_of_pairs_are_means_over_them():
    differences = np.array([1.0, -2.0, 4.0, 0.5])
    sums = PreferenceSums(loss=2.0, correct=3.0, difference=differences.sum(),
                          squared_difference=(differences**2).sum(), pairs=4.0)  # fmt: skip
    loss = preference_loss(MODELS["tiny_moe"], Objective(), Execution(), 0, Preference(beta=0.5))
    expected = {"loss": 0.5, "preference_accuracy": 0.75, "margin": 0.5 * differences.mean(),
                "difference_variance": differences.var()}  # fmt: skip
    assert loss.metrics(sums, 4.0) == pytest.approx(expected)
