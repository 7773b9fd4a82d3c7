"""Edits of a block against a scan of lists, which predictions a step writes, and blocks that repeat themselves."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.sampling import levenshtein
from llada_jax.sampling.levenshtein import EditIds

MASK, DELETE, INSERT = 10, 11, 12
IDS = EditIds(MASK, DELETE, INSERT)
edit = jax.jit(levenshtein.apply_edits, static_argnums=4)


def scan(written, before, original, fixed):
    """The description: left to right, over a list."""
    result = []
    for i, token in enumerate(written):
        if not fixed[i] and token == DELETE:
            continue
        if not fixed[i] and token == INSERT:
            result += [(MASK, False, -1), (before[i], original[i], i)]
        else:
            result.append((token, original[i] and not fixed[i], i))
    result += [(MASK, False, -1)] * len(written)
    return result[: len(written)]


@pytest.mark.parametrize("block, often", [(4, 0.9), (32, 0.3), (64, 0.6)])
def test_edits_equal_a_scan_from_left_to_right(block, often):
    rng = np.random.default_rng(block)
    rows = 200
    before = rng.integers(0, 11, (rows, block))  # masks among them
    written = np.where(rng.random((rows, block)) < often, rng.integers(7, 13, (rows, block)), before)
    original = (before == MASK) & (rng.random((rows, block)) < 0.5)
    fixed = np.arange(block) < rng.integers(0, block + 1, (rows, 1))
    found = edit(written, before, original, fixed, IDS)
    for row in range(rows):
        expected = scan(written[row], before[row], original[row], fixed[row])
        assert list(zip(*(np.asarray(x)[row].tolist() for x in found), strict=True)) == expected


def test_a_prompt_stays_whatever_it_holds():
    before = np.array([[DELETE, INSERT, MASK, 1, 2, 3]])
    written = np.array([[DELETE, INSERT, MASK, INSERT, DELETE, 3]])
    found = edit(written, before, before == MASK, np.arange(6)[None] < 3, IDS)
    assert found.tokens[0].tolist() == [DELETE, INSERT, MASK, MASK, 1, 3]
    assert not found.original.any() and found.source[0].tolist() == [0, 1, 2, -1, 3, 5]
    steps = levenshtein.moved(np.arange(6)[None] + 5, found.source)
    assert steps[0].tolist() == [5, 6, 7, 0, 8, 10]


# --- what a step writes ----------------------------------------------------------------------------------------------

DEFAULTS = dict(max_steps=4, threshold=0.5, editing_threshold=0.4, max_post_steps=3, max_steps_per_block=50)


def choice(confidence, predicted, current, original=None, generated=None, step=0, post_steps=0, **limits):
    """(positions written, final, post_steps) of one row."""
    current = np.array([current])
    generated = np.ones_like(current, bool) if generated is None else np.array([generated])
    masked = (current == MASK) & generated
    original = masked if original is None else np.array([original])
    requests = SimpleNamespace(**{name: jnp.array([value]) for name, value in (DEFAULTS | limits).items()})
    found = levenshtein.choose(
        jnp.array([confidence]), jnp.array([predicted]), current, masked, original, generated, jnp.array([step]),
        jnp.array([post_steps]), requests,
    )  # fmt: skip
    return np.flatnonzero(found.write[0]).tolist(), bool(found.final[0]), int(found.post_steps[0])


def test_masks_are_due_by_schedule_or_above_the_threshold():
    sure, block = [0.1, 0.2, 0.3, 0.45], [MASK] * 4
    assert choice(sure, [1] * 4, block)[0] == [3]
    assert choice(sure, [1] * 4, block, max_steps=2)[0] == [2, 3]
    assert choice(sure, [1] * 4, block, threshold=0.15)[0] == [1, 2, 3]
    assert choice(sure, [1] * 4, block, max_steps=8, step=4)[0] == []  # the remainder of 4 over 8 came first
    assert choice(sure, [1] * 4, block, max_steps=8, step=8)[0] == [0, 1, 2, 3]  # over
    made = [True, True, False, False]
    assert choice(sure, [1] * 4, block, original=made, max_steps=8, step=4)[0] == [2, 3]  # one for each that edits made
    prompt = [False, True, True, True]
    assert choice(sure, [1] * 4, block, generated=prompt, max_steps=2)[0] == [2, 3]  # 3 over 2 steps: 2, then 1
    assert choice(sure, [1] * 4, block, generated=prompt, max_steps=2, step=1)[0] == [3]


def test_tokens_are_edited_where_they_differ_surely_and_strictly():
    sure = [0.4, 0.41, 0.9, 0.9]
    assert choice(sure, [5, DELETE, INSERT, 4], [1, 2, 3, 4])[0] == [1, 2]
    assert choice(sure, [5, DELETE, 5, 5], [1, 2, 3, 4], generated=[False, False, True, True])[0] == [2, 3]


def test_when_a_round_is_final():
    sure, block = [0.9] * 4, [1, 2, 3, MASK]
    no = [False] * 4
    assert choice(sure, block, block)[1:] == (False, 0)  # an original mask is left
    assert choice(sure, block, block, post_steps=2)[1:] == (False, 0)
    assert choice(sure, block, block, original=no)[1:] == (False, 1)
    assert choice(sure, [1] * 4, block, original=no, post_steps=2)[1:] == (True, 3)
    assert choice([0.1] * 4, [1] * 4, block, original=no, post_steps=2)[0] == [3]  # all masks, however unsure
    assert choice(sure, block, block, step=49)[1] and not choice(sure, block, block, step=48)[1]
    assert choice(sure, [1] * 4, block, max_post_steps=0)[1:] == (True, 0)  # it writes the last original mask
    assert choice([0.1] * 4, [1] * 4, [MASK] * 4, max_post_steps=0)[1:] == (False, 0)
    assert choice(sure, [1] * 4, [1] * 4, max_post_steps=0)[1:] == (False, 1)


# --- blocks that repeat themselves -----------------------------------------------------------------------------------


def test_fingerprints_of_different_blocks_differ():
    rng = np.random.default_rng(0)
    blocks = [*itertools.product(range(6), repeat=5), *itertools.permutations(range(100, 107), 5)]
    blocks += [(100,) * 5, (101, 99, 99, 101, 100), *(tuple(row) for row in rng.integers(0, 157_184, (5000, 5)))]
    blocks = np.array(sorted(set(blocks)), np.int32)
    halves = np.asarray(levenshtein.fingerprint(blocks))
    assert len({tuple(row) for row in halves.tolist()}) == len(blocks)
    assert len(np.unique(halves[:, 0])) > 0.999 * len(blocks)  # each half is a hash of its own


def test_a_block_is_seen_from_the_step_after_it_on():
    seen = jnp.zeros((2, 2, 8), jnp.uint32)
    a, b = jnp.array([[1, 2], [3, 4]]), jnp.array([[2, 1], [3, 4]])
    assert not levenshtein.is_seen(a, seen, jnp.zeros(2, int)).any()
    seen = levenshtein.remember(a, seen, jnp.zeros(2, int))
    assert levenshtein.is_seen(a, seen, jnp.array([1, 0])).tolist() == [True, False]
    assert levenshtein.is_seen(b, seen, jnp.ones(2, int)).tolist() == [False, True]


def escaped(first, second, confidence, current, known):
    def repeats(tokens):
        return jnp.array([(tokens[0][None] == jnp.array(known)).all(-1).any()])

    first, second, confidence, current = (jnp.array([x]) for x in (first, second, confidence, current))
    exchanged = levenshtein.escape(first, second, confidence, current, repeats)
    return jnp.where(exchanged, second, first)[0].tolist()


def test_escape_exchanges_the_least_sure_changes_until_the_block_is_new():
    first, second, current, sure = [1, 2, 3, 4], [5, 6, 7, 8], [1, 0, 0, 0], [0.1, 0.9, 0.5, 0.5]
    known = [first]
    for expected in ([1, 2, 7, 4], [1, 2, 7, 8], [1, 6, 7, 8], [1, 6, 3, 8], [1, 6, 3, 4]):
        assert escaped(first, second, sure, current, known) == expected
        known.append(expected)
    assert escaped(first, second, sure, current, known) == [1, 6, 3, 4]  # five tries are all
    assert escaped(first, second, sure, current, [[0] * 4]) == first
    assert escaped(first, second, sure, first, [first]) == first  # nothing changes: it is at rest
    one = [[1, 2, 3, 4], [1, 2, 3, 8], [1, 2, 3, 0]]
    assert escaped([1, 2, 3, 4], [1, 2, 3, 8], sure, [1, 2, 3, 0], one) == [1, 2, 3, 8]  # back and forth, five times
    assert escaped([1, 2, 3, 4], [1, 2, 3, 0], sure, [1, 2, 3, 0], one) == [1, 2, 3, 0]  # no change is left to exchange
