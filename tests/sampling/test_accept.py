"""The acceptance rules on hand-made confidences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.model.config import preset
from llada_jax.sampling import accept
from llada_jax.sampling.denoise import accepted_by
from llada_jax.sampling.generate import GenerateConfig, decode_settings, requests_of
from llada_jax.sampling.predict import Prediction

CONFIDENCE = jnp.array([[0.9, 0.5, 0.9, 0.2], [0.3, 0.99, 0.299995, 0.1]])
MASKED = jnp.array([[True, True, True, True], [True, False, True, True]])  # 0.99 is written already


def positions(accepted) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in np.asarray(accepted)]


def rows(*values, dtype=jnp.float32):
    return jnp.array(values, dtype)


def test_the_schedule_spreads_the_block_over_the_steps():
    assert [accept.due(8, 3, step) for step in range(3)] == [3, 3, 2]
    assert [accept.due(4, 6, step) for step in range(6)] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "threshold, due, expected",
    [
        (0.4, (2, 1), [[0, 1, 2], [0]]),  # more than due pass: all of them. None passes: those due
        (0.9, (1, 2), [[0], [0, 2]]),  # strictly above; the lowest of a tie
        (0.9, (3, 3), [[0, 1, 2], [0, 2, 3]]),
        (0.2, (4, 1), [[0, 1, 2, 3], [0, 2]]),  # fewer pass than due
    ],
)
def test_llada2(threshold, due, expected):
    thresholds = rows(threshold, threshold)
    assert positions(accept.llada2(CONFIDENCE, MASKED, rows(*due, dtype=jnp.int32), thresholds)) == expected


def test_each_row_has_its_own_threshold():
    assert positions(accept.sglang(CONFIDENCE, MASKED, rows(0.8, 0.05))) == [[0, 2], [0, 2, 3]]


def test_sglang_falls_back_to_one():
    assert positions(accept.sglang(CONFIDENCE, MASKED, rows(0.95, 0.95))) == [[0], [0]]


def test_dinfer_takes_near_ties_of_the_largest_and_what_equals_the_threshold():
    assert positions(accept.dinfer(CONFIDENCE, MASKED, rows(0.95, 0.95))) == [[0, 2], [0, 2]]
    assert positions(accept.dinfer(CONFIDENCE, MASKED, rows(0.5, 0.1))) == [[0, 1, 2], [0, 2, 3]]


def test_entropy_takes_the_surest_and_as_many_as_the_bound_allows_but_for_the_largest():
    entropy = jnp.array([[0.1, 0.05, 2.0, 0.2], [0.3, 0.0, 0.4, 0.1]])
    assert positions(accept.entropy(entropy, MASKED, rows(0.14, 0.05))) == [[0, 1], [3]]  # the surest, over the bound
    assert positions(accept.entropy(entropy, MASKED, rows(0.16, 0.11))) == [[0, 1, 3], [0, 3]]  # the largest is free
    assert positions(accept.entropy(entropy, MASKED, rows(10.0, 0.45))) == [[0, 1, 2, 3], [0, 2, 3]]
    assert positions(accept.entropy(entropy, MASKED, rows(0.0, np.inf))) == [[1], [0, 2, 3]]


def test_entropy_is_the_condition_of_eb_sampler():
    """Sum less maximum of the surest k, at most the bound: the largest such k, of the masked positions."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        entropy, masked, bound = rng.gamma(0.5, 0.3, 16), rng.random(16) < 0.7, rng.exponential(0.3)
        order = [i for i in np.argsort(entropy) if masked[i]]
        most = max((k for k in range(1, len(order) + 1) if entropy[order[: k - 1]].sum() <= bound), default=0)
        found = accept.entropy(jnp.asarray(entropy[None], jnp.float32), jnp.asarray(masked[None]), rows(bound))
        assert positions(found) == [sorted(order[:most])]


def test_dinfer_leaves_out_where_the_mask_comes_first_unless_nothing_else_is_left():
    mask_first = jnp.array([[True, False, False, False], [True, True, True, True]])
    assert positions(accept.dinfer(CONFIDENCE, MASKED, rows(0.5, 0.1), mask_first)) == [[1, 2], [0, 2, 3]]
    assert positions(accept.dinfer(CONFIDENCE, MASKED, rows(0.95, 0.95), mask_first)) == [[2], [0, 2]]


def test_what_need_not_accept_takes_only_what_passes():
    """Of two equal rows, the second is not forced."""
    confidence, masked = jnp.array([[0.3, 0.5, 0.9, 0.2]] * 2), jnp.array([[True, False, True, True]] * 2)
    forced, most = jnp.array([True, False]), float(confidence[0, 2])
    for threshold, expected in ((2.0, []), (most, []), (most - 0.001, [2])):
        assert positions(accept.sglang(confidence, masked, rows(threshold, threshold), forced)) == [[2], expected]
    for threshold, expected in ((2.0, []), (most, [2])):
        assert positions(accept.dinfer(confidence, masked, rows(threshold, threshold), None, forced)) == [[2], expected]
    mask_first = jnp.ones_like(masked)
    both = positions(accept.dinfer(confidence, masked, rows(0.0, 0.0), mask_first, forced))
    assert both == [np.flatnonzero(masked[0]).tolist(), []]
    entropy = jnp.array([[0.1, 0.05, 2.0, 0.2]] * 2)
    for bound, expected in ((0.0, []), (0.06, [1]), (0.16, [0, 1]), (5.0, [0, 1, 2, 3])):  # the largest counts too
        found = positions(accept.entropy(entropy, jnp.ones((2, 4), bool), rows(bound, bound), forced))
        assert found[1] == expected and found[0] == sorted(np.argsort(entropy[0])[: len(expected) + 1].tolist())


def test_fixed_takes_those_due_and_never_more_than_are_masked():
    assert positions(accept.fixed(CONFIDENCE, MASKED, rows(2, 4, dtype=jnp.int32))) == [[0, 2], [0, 2, 3]]


def test_edits_where_the_prediction_differs_and_is_sure():
    predicted, current = jnp.array([[1, 2, 3, 4]] * 2), jnp.array([[1, 9, 9, 9]] * 2)
    editable = jnp.array([[True, True, True, False]] * 2)
    edited = accept.edits(CONFIDENCE, predicted, current, editable, rows(0.5, 0.0))
    assert positions(edited) == [[2], [1, 2]]


@pytest.mark.parametrize("rule", ["llada2", "llada2.1", "sglang", "dinfer", "entropy", "fixed"])
def test_probabilities_that_are_nan_end_too_and_are_the_least_sure(rule):
    """Of weights that are not finite: a rule that waits for a number would never fill the block."""
    nan, free = jnp.nan, jnp.array([[True, False, True, True]] * 2)
    values = jnp.array([[nan, 0.5, nan, nan], [nan, 0.5, nan, 0.02]])
    config = GenerateConfig(gen_length=8, block_length=4, steps=4, rule=rule, threshold=2.0, entropy_bound=0.01)
    requests = requests_of(preset("tiny"), np.array([0, 0]), [config] * 2, jax.random.split(jax.random.key(0)))
    settings = decode_settings(preset("tiny"), [config])
    prediction = Prediction(jnp.zeros((2, 4), jnp.int32), values, values, jnp.zeros((2, 4), bool))
    accepted = accepted_by(settings, requests, free, jnp.zeros(2, jnp.int32), prediction)
    assert positions(accepted)[1] == [3] and positions(accepted)[0] and not (accepted & ~free).any()
