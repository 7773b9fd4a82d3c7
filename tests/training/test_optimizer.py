"""The learning rate of every step of a run, and what a step does with a gradient."""

import jax
import numpy as np
import pytest

from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.training.config import default_config
from llada_jax.training.optimizer import learning_rate, make_optimizer


def rates(total, **changes):
    config = default_config("tiny").optimizer
    config.update(learning_rate=1.0, warmup_steps=0, decay_steps=0, end_fraction=0.1)
    config.update(changes)
    schedule = learning_rate(config, total)
    return np.array([schedule(step) for step in range(total)])


def test_it_warms_up_to_the_rate_and_ends_at_the_end():
    actual = rates(10, warmup_steps=4, decay_steps=3)
    np.testing.assert_allclose(actual, [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1], rtol=1e-6)


@pytest.mark.parametrize("decay", [1, 2, 7, 10, 25])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_last_step_has_the_last_rate_exactly(decay, end, warmup):
    actual = rates(10, warmup_steps=warmup, decay_steps=decay, end_fraction=end)
    assert actual[-1] == np.float32(end)
    assert (np.diff(actual[max(warmup - 1, 0) :]) <= 0).all()
    before = 10 - min(decay, 10 - warmup)  # steps until it decays
    assert (actual[max(warmup - 1, 0) : before] == 1).all() and (end == 1 or (actual[before:] < 1).all())


def test_without_decay_it_stays_and_a_warm_up_may_fill_the_run():
    assert (rates(6, end_fraction=0.0) == 1).all()
    np.testing.assert_allclose(rates(4, warmup_steps=8, decay_steps=3), [0.25, 0.5, 0.75, 1])
    assert rates(1, decay_steps=1) == np.float32(0.1) and rates(1) == 1


def test_a_rate_that_is_not_known_yet_is_zero_in_a_rehearsal():
    assert (rates(4, learning_rate=None, warmup_steps=2, decay_steps=1) == 0).all()


def test_it_is_adamw_of_clipped_gradients_which_decays_matrices_only():
    small = dict(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    small |= dict(rotary_dim=4, intermediate_size=16, moe_intermediate_size=8)
    model, config = preset("tiny_moe").replace(**small), default_config("tiny").optimizer
    config.update(learning_rate=0.1, warmup_steps=0, decay_steps=0)
    config.update(clip_norm=0.5, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), parameters.abstract(model))
    optimizer = make_optimizer(config, model, total_steps=3)
    update = jax.jit(optimizer.update)
    found, state = weights, optimizer.init(weights)
    paths = [path[-1].key for path, _ in jax.tree.leaves_with_path(weights)]
    assert {"attention_norm", "expert_bias", "embedding", "gate"} < set(paths)
    decays = [not (path.endswith("norm") or "bias" in path) for path in paths]
    expected = [leaf.astype(np.float64) for leaf in jax.tree.leaves(weights)]
    first, second = ([np.zeros_like(leaf) for leaf in expected] for _ in range(2))
    for step, size in ((1, 1.0), (2, 1e-4)):  # a gradient that is clipped, and one that is not
        gradients = jax.tree.map(lambda x: (size * rng.normal(size=x.shape)).astype(np.float32), weights)  # noqa: B023
        updates, state = update(gradients, state, found)
        found = jax.tree.map(np.add, found, updates)
        leaves = [leaf.astype(np.float64) for leaf in jax.tree.leaves(gradients)]
        norm = np.sqrt(sum((leaf**2).sum() for leaf in leaves))
        assert (norm > 0.5) == (step == 1)
        for i, gradient in enumerate(leaf * min(1, 0.5 / norm) for leaf in leaves):
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            change = first[i] / (1 - 0.8**step) / (np.sqrt(second[i] / (1 - 0.95**step)) + 1e-3)
            expected[i] = expected[i] - 0.1 * (change + 0.3 * decays[i] * expected[i])
    for path, one, other in zip(paths, jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6, err_msg=path)
