"""Held-out preference: scores against exact cases, numbers and their standard errors against plain formulas."""

import jax
import numpy as np
import pytest

from llada_jax.evaluation.likelihood import block_nelbo
from llada_jax.evaluation.preference import chosen_only, compare, pair_scores, pairs_in
from tests.diffusion.test_objectives import TINY, params_of
from tests.diffusion.test_preference import SEGMENTS, batch, other_params


def host_batch():
    return jax.tree.map(np.asarray, batch())


def test_the_uniform_model_scores_the_number_of_answer_tokens_times_log_v():
    zero = jax.tree.map(np.zeros_like, params_of(TINY))
    rows = host_batch()
    scores = pair_scores(zero, TINY, rows, 1, 3, draws=1, rows_at_once=3)  # at block size 1 every token is masked
    tokens = [[(rows.supervised[r] & (SEGMENTS[r] == s)).sum() for s in range(1, 7)] for r in range(2)]
    np.testing.assert_allclose(scores.reshape(2, 6), -np.log(TINY.vocab_size) * np.array(tokens), rtol=1e-5)
    assert pairs_in(SEGMENTS) == 2 and not scores[:, 2].any()


def test_scores_are_the_same_at_every_call_and_for_any_number_of_rows_at_once():
    rows = host_batch()
    a = pair_scores(other_params(), TINY, rows, 4, 2, draws=3, rows_at_once=2)
    assert np.array_equal(a, pair_scores(other_params(), TINY, rows, 4, 2, draws=3, rows_at_once=2))
    np.testing.assert_allclose(a, pair_scores(other_params(), TINY, rows, 4, 2, draws=3, rows_at_once=1), rtol=1e-5)
    assert not np.array_equal(a, pair_scores(other_params(), TINY, rows, 4, 2, draws=3, rows_at_once=2, seed=1))


def test_the_policy_that_is_the_reference_prefers_nothing():
    scores = pair_scores(params_of(TINY), TINY, host_batch(), 4, 2)
    found = compare(scores, scores, SEGMENTS, 0.1)
    assert (found.accuracy, found.margin, found.variance, found.pairs) == (0, 0, 0, 4)


def test_the_nelbo_of_chosen_answers_does_not_see_the_rejected_ones():
    rows, rejected = chosen_only(host_batch()), (SEGMENTS > 0) & (SEGMENTS % 2 == 0)
    changed = rows.replace(ids=np.where(rejected, 7, rows.ids))
    a, b = (block_nelbo(params_of(TINY), TINY, r, 1, block_origin="document") for r in (rows, changed))
    assert a == b and a.tokens == (host_batch().supervised & (SEGMENTS % 2 == 1)).sum()


def test_one_pair_has_no_standard_error():
    policy = np.array([[[3.0, 1.0]]], np.float32)
    found = compare(policy, np.zeros_like(policy), np.array([[1, 1, 2, 0]]), 0.5)
    assert (found.accuracy, found.margin, found.variance, found.pairs) == (1, 1, None, 1)
    assert found.accuracy_stderr is found.margin_stderr is found.variance_stderr is None
    assert found.describe() == "accuracy 1.000 ± n/a   margin 1.0000 ± n/a   Var n/a ± n/a (1 pairs)"


def test_numbers_and_standard_errors():
    """400 pairs of normal differences, in rows with room for more pairs than they have."""
    rng = np.random.default_rng(0)
    segments = np.tile(np.arange(1, 5), (200, 1))
    estimates = []
    for _ in range(200):
        reference = rng.normal(size=(200, 3, 2)).astype(np.float32)
        policy = reference.copy()
        policy[:, :2, 0] += rng.normal(1.0, 2.0, size=(200, 2))
        policy[:, 2] = 1e6  # not a pair
        estimates.append(compare(policy, reference, segments, 0.5))
    assert all(found.pairs == 400 for found in estimates)
    for name, expected in {"accuracy": 0.6915, "margin": 0.5, "variance": 4.0}.items():
        values = np.array([getattr(found, name) for found in estimates])
        assert values.mean() == pytest.approx(expected, rel=0.02)
        assert values.std() == pytest.approx(np.mean([getattr(f, f"{name}_stderr") for f in estimates]), rel=0.2)
