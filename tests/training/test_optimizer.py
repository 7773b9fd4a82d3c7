"""The learning rate of every step of a run."""

import numpy as np
import pytest

from llada_jax.training.config import default_config
from llada_jax.training.optimizer import learning_rate


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
