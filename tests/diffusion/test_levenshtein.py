"""Labels of Levenshtein editing against all alignments of small blocks, and what becomes of drafts that follow them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.diffusion import levenshtein
from llada_jax.sampling.levenshtein import EditIds, apply_edits

MASK, DELETE, INSERT = 90, 91, 92
labels = jax.jit(levenshtein.labels, static_argnums=(2, 3, 4), static_argnames="masks_match")
anchors = jax.jit(levenshtein.anchors, static_argnums=2, static_argnames="masks_match")
edit = jax.jit(apply_edits, static_argnums=4)


def drafts(rng, count, block, letters, masked=0.3):
    """Random (drafts, targets): half are unrelated, half are targets that lost and gained tokens."""
    target = rng.integers(0, letters, (count, block))
    draft = rng.integers(0, letters, (count, block))
    for row in range(count // 2):
        kept = [t for t in target[row] if rng.random() > 0.2]
        for _ in range(rng.integers(0, 3)):
            kept.insert(rng.integers(0, len(kept) + 1), rng.integers(0, letters))
        draft[row] = (kept + [MASK] * block)[:block]
    draft[rng.random(draft.shape) < masked * rng.random((count, 1))] = MASK
    return draft, target


def alignments(block):
    """All ways to match positions of a draft with those of a target in order: tuples of target indices, or -1."""
    for matched in itertools.product([False, True], repeat=block):
        for chosen in itertools.combinations(range(block), sum(matched)):
            chosen = iter(chosen)
            yield tuple(next(chosen) if yes else -1 for yes in matched)


def best_alignment(draft, target, masks_match, fixed, ways):
    def allowed(i, j):
        if i < fixed or j < fixed:
            return i == j
        return draft[i] == target[j] or (masks_match and draft[i] == MASK)

    possible = [way for way in ways if all(j < 0 or allowed(i, j) for i, j in enumerate(way))]
    most = max(sum(j >= 0 for j in way) for way in possible)
    longest = [way for way in possible if sum(j >= 0 for j in way) == most]
    # From the last position on: an anchor rather than none; near its own index; low.
    return max(longest, key=lambda way: [(j >= 0, -abs(j - i), -j) for i, j in reversed(list(enumerate(way)))])


def labels_of(draft, target, way):
    """The rules, one gap after the other."""
    found, i, j = [], 0, 0
    for a in [k for k, at in enumerate(way) if at >= 0]:
        gap, wanted = a - i, target[j : way[a]]
        found += [wanted[k] if k < len(wanted) else DELETE for k in range(gap)]
        found.append(INSERT if len(wanted) > gap else target[way[a]])
        i, j = a + 1, way[a] + 1
    return found + [DELETE] * (len(draft) - i)


@pytest.mark.parametrize("masks_match", [True, False])
@pytest.mark.parametrize("fixed", [0, 2])
def test_equal_all_alignments_tried_in_turn(masks_match, fixed):
    block = 5
    ways = list(alignments(block))
    draft, target = drafts(np.random.default_rng(fixed), 120, block, letters=3)
    draft[:, :fixed] = target[:, :fixed]
    prompt = jnp.broadcast_to(jnp.arange(block) < fixed, draft.shape)
    match = np.asarray(anchors(draft, target, MASK, prompt, masks_match=masks_match))
    found = np.asarray(labels(draft, target, MASK, DELETE, INSERT, prompt, masks_match=masks_match))
    for row in range(len(draft)):
        way = best_alignment(draft[row], target[row], masks_match, fixed, ways)
        assert match[row].tolist() == list(way), (draft[row], target[row])
        assert found[row].tolist() == labels_of(draft[row], target[row], way), (draft[row], target[row])
    assert np.array_equal(found[:, :fixed], target[:, :fixed])


def common_length(draft, target, masks_match):
    """The length of a longest common subsequence, by the textbook's table."""
    table = [[0] * (len(target) + 1) for _ in range(len(draft) + 1)]
    for i, x in enumerate(draft, 1):
        for j, y in enumerate(target, 1):
            if x == y or (masks_match and x == MASK):
                table[i][j] = table[i - 1][j - 1] + 1
            else:
                table[i][j] = max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@pytest.mark.parametrize("block, letters", [(16, 4), (64, 30)])
def test_anchors_are_a_longest_common_subsequence(block, letters):
    draft, target = drafts(np.random.default_rng(block), 24, block, letters)
    for masks_match in (True, False):
        # Batched as [rows, blocks, block].
        match = anchors(draft.reshape(6, 4, -1), target.reshape(6, 4, -1), MASK, masks_match=masks_match)
        for row, way in enumerate(np.asarray(match).reshape(24, block)):
            at = way[way >= 0]
            assert (np.diff(at) > 0).all()
            same = draft[row][way >= 0] == target[row][at]
            assert (same | (masks_match & (draft[row][way >= 0] == MASK))).all()
            assert len(at) == common_length(draft[row], target[row], masks_match)


def follow(draft, found):
    """The drafts after one round in which the model writes its labels."""
    ids, never = EditIds(MASK, DELETE, INSERT), np.zeros(draft.shape, bool)
    return np.asarray(edit(found, draft, never, never, ids).tokens)


def test_drafts_that_follow_their_labels_become_their_targets():
    block = 12
    draft, target = drafts(np.random.default_rng(5), 200, block, letters=4, masked=0.6)
    rounds = 0
    while (draft != target).any():
        found = np.asarray(labels(draft, target, MASK, DELETE, INSERT))
        after = follow(draft, found)
        assert not np.isin(after, (DELETE, INSERT)).any()
        simple = ~(found == INSERT).any(1) & ~(found == DELETE).any(1)
        assert np.array_equal(after[simple], target[simple])  # where all stays in place one round is enough
        moves = (draft != target).any(1)
        assert (after != draft)[moves].any(1).all()
        draft, rounds = after, rounds + 1
        assert rounds <= 2 * block
    assert rounds > 2  # of the worst of them
    assert np.array_equal(labels(target, target, MASK, DELETE, INSERT), target)  # and then they stay


@pytest.mark.parametrize(
    "draft, target, expected",
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 9, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),  # substituted
        ([1, 9, 2, 3], [1, 2, 3, 4], [1, DELETE, 2, 3]),
        ([1, 3, 4, 5], [1, 2, 3, 4], [1, INSERT, 4, DELETE]),
        ([1, 4, MASK, MASK], [1, 2, 3, 4], [1, 2, 3, 4]),  # two masks match, and so many tokens do not
        ([5, 6, 7, 8], [1, 2, 3, 4], [DELETE] * 4),  # nothing to hold on to
        ([MASK] * 4, [1, 2, 3, 4], [1, 2, 3, 4]),
        ([4, 4, 4, 4], [1, 2, 3, 4], [1, 2, 3, 4]),  # the last of them is the anchor, the others are aligned
    ],
)
def test_examples(draft, target, expected):
    found = labels(jnp.array([draft]), jnp.array([target]), MASK, DELETE, INSERT)
    assert found[0].tolist() == expected


def test_a_mask_that_may_not_match_is_replaced_or_deleted():
    draft, target = jnp.array([[MASK, 2, MASK, MASK]]), jnp.array([[1, 2, 3, 4]])
    found = labels(draft, target, MASK, DELETE, INSERT, masks_match=False)
    assert found[0].tolist() == [1, 2, DELETE, DELETE]


def test_rows_are_labelled_block_by_block_where_an_edit_stays_within_an_answer():
    rng = np.random.default_rng(5)
    block, (draft, target) = 8, drafts(rng, 5, 8, letters=4)
    ids = dict(mask_id=MASK, delete_id=DELETE, insert_id=INSERT)
    writable = np.ones((5, block), bool)
    writable[1, :3] = False  # a prompt before the answer
    writable[2, 3:5] = False  # a prompt behind an answer
    segments = np.ones((5, block), int)
    segments[3, 4:] = 2  # two documents
    draft = np.where(writable, draft, target)
    rows = [x.reshape(1, -1) for x in (draft, target, writable, segments)]
    found = np.asarray(levenshtein.labels_of_rows(*map(jnp.asarray, rows), block, **ids)).reshape(5, block)
    expected = np.asarray(labels(draft, target, MASK, DELETE, INSERT, jnp.asarray(~writable)))
    for i in (0, 1, 4):
        assert np.array_equal(found[i], expected[i])
    assert np.array_equal(found[2:4], target[2:4]) and not np.array_equal(expected[2:4], target[2:4])
