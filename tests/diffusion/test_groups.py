"""Groups of blocks: the mask and the noise against what the equations say, cell by cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.attention.visibility import BLOCK_ORIGINS, block_diffusion, dense_mask, make_layout
from llada_jax.diffusion import noise
from llada_jax.diffusion.groups import Groups, grouped, groups_of, variants
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.errors import InputError
from tests.helpers.environment import examples
from tests.helpers.programs import draw_masking

LENGTH = 26


def blocks_of(segments, block_size, origin):
    """[(first, end)] of each block of a row, in order."""
    edges = [0]
    for i in range(1, len(segments)):
        start = max(j for j in range(i + 1) if j == 0 or segments[j - 1] != segments[j] or segments[j] == 0)
        offset = i - start if origin == "document" else i
        if i == start or offset % block_size == 0:
            edges.append(i)
    return list(zip(edges, [*edges[1:], len(segments)], strict=True))


def groups_by_hand(segments, blocks, answered, size, shift):
    """The blocks of a row as lists, one a group: walks over the documents block by block."""
    groups, document, number = [], None, 0
    for first, end in blocks:
        if segments[first] == 0 or segments[first] != document:
            document, number = segments[first] or None, 0
        goes_on = first > 0 and answered[first - 1] and answered[first]
        at_edge = number == 0 or number == shift or (number > shift and (number - shift) % size == 0)
        if goes_on and not at_edge:
            groups[-1].append((first, end))
        else:
            groups.append([(first, end)])
        number += 1
    return groups


def mask_by_hand(segments, groups):
    """noisy -> noisy: same group, block(k) <= block(q); noisy -> clean: before the group; clean: block-causal."""
    n = len(segments)
    block = np.zeros(n, int)
    group = np.zeros(n, int)
    number = 0
    for g, members in enumerate(groups):
        for first, end in members:
            block[first:end], group[first:end] = number, g
            number += 1
    mask = np.zeros((2 * n, 2 * n), bool)
    for q in range(2 * n):
        for k in range(2 * n):
            i, j = q % n, k % n
            if segments[i] == 0 or segments[j] == 0:
                mask[q, k] = q == k
            elif segments[i] == segments[j]:
                if q < n and k < n:
                    mask[q, k] = group[i] == group[j] and block[j] <= block[i]
                elif q < n:
                    mask[q, k] = group[j] < group[i]
                else:
                    mask[q, k] = k >= n and block[j] <= block[i]
    return mask


@st.composite
def rows(draw):
    ends = draw(st.lists(st.integers(1, LENGTH), max_size=3, unique=True))
    segments = 1 + np.searchsorted(np.sort(np.array(ends, int)), np.arange(LENGTH), side="right")
    segments[LENGTH - draw(st.integers(0, 3)) :] = 0
    answered = np.zeros(LENGTH, bool)
    for _ in range(draw(st.integers(0, 3))):
        first = draw(st.integers(0, LENGTH - 1))
        answered[first : first + draw(st.integers(1, LENGTH))] = True
    size = draw(st.integers(1, 4))
    shift = draw(st.integers(0, size - 1))
    return (
        segments,
        answered & (segments > 0),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(BLOCK_ORIGINS)),
        size,
        shift,
    )


@jax.jit
def masked_rows(segments, answered, block_size, size, shift):
    def of(origin):
        layout = make_layout(segments, block_size, origin)
        layout = grouped(layout, Groups(size[None], shift[None]), answered)
        return layout.group_start, dense_mask(block_diffusion(layout), 2 * LENGTH)[0]

    return [of(origin) for origin in BLOCK_ORIGINS]


@settings(max_examples=examples(60, 400), deadline=None)
@given(rows())
def test_the_mask_of_groups_is_that_of_the_equations(row):
    segments, answered, block_size, origin, size, shift = row
    results = masked_rows(segments[None], answered[None], np.int32(block_size), np.int32(size), np.int32(shift))
    group_start, mask = results[BLOCK_ORIGINS.index(origin)]
    groups = groups_by_hand(segments, blocks_of(segments, block_size, origin), answered, size, shift)
    assert np.array_equal(mask, mask_by_hand(segments, groups))
    starts = np.concatenate([np.full(members[-1][1] - members[0][0], members[0][0]) for members in groups])
    assert np.array_equal(group_start[0], starts)


def test_a_group_ends_where_an_answer_does_with_a_prompt_between_two_of_them():
    """Blocks of 4; the first answer ends, and the prompt of the second begins, inside the third block."""
    answered = np.zeros((1, 20), bool)
    answered[0, 4:10] = answered[0, 14:20] = True
    group_start, _ = masked_rows(
        np.pad(np.ones((1, 20), int), ((0, 0), (0, LENGTH - 20))), np.pad(answered, ((0, 0), (0, LENGTH - 20))),
        np.int32(4), np.int32(4), np.int32(0),
    )[BLOCK_ORIGINS.index("global")]  # fmt: skip
    assert group_start[0, :20:4].tolist() == [0, 4, 4, 12, 16]


def test_every_size_and_shift_comes_once_and_each_row_meets_all_of_them():
    assert variants(1).tolist() == [[1, 0]]
    assert variants(3).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]
    assert len(variants(4)) == 4 * 5 // 2 - 1
    met = [groups_of(jnp.arange(3, dtype=jnp.uint32), jnp.full(3, epoch, jnp.uint32), 4) for epoch in range(9)]
    for row in range(3):
        assert {(int(g.size[row]), int(g.shift[row])) for g in met} == {tuple(v) for v in variants(4).tolist()}
    assert len({(int(s), int(f)) for s, f in zip(met[0].size, met[0].shift, strict=True)}) == 3  # a batch mixes them


def chain_by_hand(u, floors, groups, low, high):
    rate = np.zeros(LENGTH)
    for members in groups:
        first = members[0][0]
        least = low + (high - low) * floors[first]
        for start, end in members:
            least = least + (high - least) * u[start]
            rate[start:end] = least
    return rate


@settings(max_examples=examples(30, 200), deadline=None)
@given(rows(), st.integers(0, 2**31 - 1))
def test_rates_of_a_chain_are_those_of_its_draws_one_after_the_other(row, seed):
    segments, answered, block_size, origin, size, shift = row
    keys = noise.example_keys(seed, jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.uint32))
    layout = grouped(
        make_layout(jnp.asarray(segments)[None], block_size, origin),
        Groups(jnp.int32([size]), jnp.int32([shift])), jnp.asarray(answered)[None],
    )  # fmt: skip
    drawn = draw_masking(keys, jnp.asarray(answered)[None], layout, NoiseSpec("chain", 0.1, 0.9))
    u, floors = (noise.uniform(keys, use, LENGTH)[0] for use in (noise.TIMES, noise.FLOORS))
    groups = groups_by_hand(segments, blocks_of(segments, block_size, origin), answered, size, shift)
    rate = np.asarray(drawn.rate[0])
    np.testing.assert_allclose(rate, chain_by_hand(np.asarray(u), np.asarray(floors), groups, 0.1, 0.9), atol=1e-6)
    for members in groups:  # exactly: a later block has at least the rate of the one before
        assert (np.diff(rate[members[0][0] : members[-1][1]]) >= 0).all()
    scores = np.asarray(noise.uniform(keys, noise.MASKS, LENGTH)[0])
    assert np.array_equal(drawn.masked[0], answered & (scores < rate))


def test_floor_count_masks_so_many_of_each_block():
    eligible = np.random.default_rng(0).random((2000, 16)) < 0.7
    keys = noise.example_keys(0, jnp.arange(2000, dtype=jnp.uint32), jnp.zeros(2000, jnp.uint32))
    layout = make_layout(jnp.ones((2000, 16), jnp.int32), 8)
    up, down = (
        draw_masking(keys, jnp.asarray(eligible), layout, NoiseSpec(rate_low=0.0, masking=masking))
        for masking in ("bernoulli", "floor_count")
    )
    n = eligible.reshape(2000, 2, 8).sum(-1)
    count = np.floor(np.asarray(up.rate)[:, ::8] * n)
    assert np.array_equal(np.asarray(down.masked).reshape(2000, 2, 8).sum(-1), count)
    assert (count == 0).any() and not (np.asarray(down.masked) & ~eligible).any()
    np.testing.assert_allclose(down.rate[:, ::8], count / np.maximum(n, 1), rtol=1e-6)


def test_a_chain_has_no_spread():
    with pytest.raises(InputError, match="spread=True"):
        NoiseSpec("chain", spread=True)
