"""What a learner passes over: all that a gradient comes from, and little else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.reinforcement.passes import as_passes, few_sizes, num_passes, with_gradient
from llada_jax.reinforcement.scoring import ScoredRows


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 6000))
def test_few_sizes_are_multiples_and_a_quarter_more_at_worst(number, unit, most):
    most = max(most, number)
    size = few_sizes(number, unit, most)
    assert number <= size <= most
    assert size == most or (size % unit == 0 and size <= 1.25 * number + unit)
    assert size == most or bin(size // unit).rstrip("0").count("1") <= 3


def test_a_doubling_has_four_sizes():
    assert {few_sizes(number, 3, 1 << 20) for number in range(3 * 64 + 1, 3 * 128 + 1)} == {240, 288, 336, 384}


def test_rows_without_advantage_are_left_out():
    advantage = np.zeros(48)
    advantage[[1, 3]] = 1, -1
    part = np.arange(48)[::-1]
    assert with_gradient(part, advantage, 1).tolist() == [3, 1]
    assert with_gradient(part, advantage, 12).tolist() == [3, 1, *range(47, 37, -1)]
    assert len(with_gradient(part, np.zeros(48), 2)) == 2
    assert sorted(with_gradient(part, np.ones(48), 1)) == list(range(48))


@given(st.integers(1, 2000), st.integers(1, 6), st.integers(1, 6))
def test_passes_are_whole_micro_batches(number, least, many):
    micro_rows = least * many
    rows = num_passes(number, micro_rows, least)
    assert number <= rows and rows % (micro_rows if rows > micro_rows else least) == 0


def scored_rows(seed: int, rows: int, copies: int, length: int = 5) -> ScoredRows:
    random = np.random.default_rng(seed)
    scored = (random.random((rows, copies, 1)) < 0.4) & (random.random((rows, copies, length)) < 0.6)
    return ScoredRows(
        tokens=random.integers(0, 9, (rows, length)),
        segment_ids=random.integers(0, 2, (rows, length)),
        hidden=random.random((rows, copies, length)) < 0.5,
        weights=(scored * random.random(scored.shape)).astype(np.float32),
        advantage=random.normal(size=rows).astype(np.float32),
        tokens_scored=random.random(rows).astype(np.float32),
    )


def passes_of(rows: ScoredRows) -> list:
    """Of every copy that scores a token, all that its loss depends on; sorted."""
    return sorted(
        (rows.tokens[row].tolist(), rows.segment_ids[row].tolist(), rows.hidden[row, copy].tolist(),
         rows.weights[row, copy].tolist(), float(rows.advantage[row]), float(rows.tokens_scored[row]))
        for row in range(len(rows.tokens))
        for copy in range(rows.weights.shape[1])
        if (rows.weights[row, copy] > 0).any()
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "copies", "micro_rows", "least"), [(12, 7, 4, 2), (12, 7, 12, 4), (3, 2, 8, 2)])
def test_every_copy_that_scores_a_token_is_a_pass(rows, copies, micro_rows, least):
    before = scored_rows(rows, rows, copies)
    after = as_passes(before, micro_rows, least)
    assert after.hidden.shape[1] == 1 and passes_of(after) == passes_of(before)
    count = len(after.tokens)
    assert count % (micro_rows if count > micro_rows else least) == 0
    assert count <= max(1.25 * len(passes_of(before)) + micro_rows, least)
    scored = (before.weights[:, 0] > 0).any(axis=1)
    np.testing.assert_array_equal(after.tokens[: scored.sum()], before.tokens[scored])  # first copies lead


def test_nothing_to_score_is_one_pass_that_scores_nothing():
    before = scored_rows(0, 4, 3)
    before = before.replace(weights=np.zeros_like(before.weights))
    after = as_passes(before, 4, 2)
    assert len(after.tokens) == 2 and not after.weights.any()
