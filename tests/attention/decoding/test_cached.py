"""Attention over a cache equals dense attention over own and cached keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.attention.decoding import cached
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.visibility import block_window, dense_mask, two_block_window


def stack(x):
    """A cache of three layers from [batch, positions, kv_heads, head_dim]; all but layer 1 is NaN."""
    x = jnp.moveaxis(x, 1, 2)
    return jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.full_like(x, jnp.nan)])


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_equals_dense_attention(monkeypatch, chunk):
    monkeypatch.setattr(cached, "LEAST_CHUNK", chunk)
    rng = np.random.default_rng(0)
    block, rows, length = 3, 4, 19
    starts = jnp.array([0, 3, 6, 12])  # the longest prefix ends in the middle of the cache
    for visibility in (block_window(starts, block), two_block_window(starts, block, jnp.array([1, 0, 1, 0], bool))):
        queries = visibility.num_noisy
        shapes = (queries, 4), (queries, 2), (queries, 2), (length, 2), (length, 2)
        q, k, v, ck, cv = (jnp.asarray(rng.normal(size=(rows, n, h, 8)), jnp.float32) for n, h in shapes)
        expected = dense_attention(q, jnp.concatenate([k, ck], 1), jnp.concatenate([v, cv], 1), visibility)
        stacks = (stack(x) for x in (ck, cv))
        found = jax.jit(cached.cached_attention)(q, k, v, *stacks, 1, visibility)
        assert np.allclose(found, expected, atol=1e-5)


def test_prefixes_that_end_in_a_last_chunk_which_overlaps_the_one_before(monkeypatch):
    """Of 19 positions in chunks of 4, all rows see the first four chunks whole, and of the last one a part."""
    monkeypatch.setattr(cached, "LEAST_CHUNK", 4)
    rng, visibility = np.random.default_rng(0), block_window(jnp.array([18, 17]), 3)
    shapes = (3, 4), (3, 2), (3, 2), (19, 2), (19, 2)
    q, k, v, ck, cv = (jnp.asarray(rng.normal(size=(2, n, h, 8)), jnp.float32) for n, h in shapes)
    expected = dense_attention(q, jnp.concatenate([k, ck], 1), jnp.concatenate([v, cv], 1), visibility)
    found = jax.jit(cached.cached_attention)(q, k, v, stack(ck), stack(cv), 1, visibility)
    assert np.allclose(found, expected, atol=1e-5)


def test_reads_nothing_beyond_the_longest_prefix(monkeypatch):
    monkeypatch.setattr(cached, "LEAST_CHUNK", 4)
    ones = jnp.ones((1, 2, 2, 8))
    poisoned = jnp.ones((1, 1, 2, 16, 8)).at[..., 8:, :].set(jnp.nan)
    found = cached.cached_attention(ones, ones, ones, poisoned, poisoned, 0, block_window(jnp.array([6]), 2))
    assert np.allclose(found, 1)


def test_a_window_shows_all_of_itself_and_the_prefix_of_its_row():
    mask = np.asarray(dense_mask(block_window(jnp.array([0, 3]), 2), 2 + 4)).astype(int)  # own keys, then the cache
    assert mask.tolist() == [[[1, 1, 0, 0, 0, 0]] * 2, [[1, 1, 1, 1, 1, 0]] * 2]


def test_two_block_window_shows_the_finished_block_from_the_cache_or_from_the_window():
    starts = jnp.array([2, 2])
    mask = np.asarray(dense_mask(two_block_window(starts, 2, jnp.array([False, True])), 8))
    picture = lambda rows: ["".join(".x"[int(key)] for key in row) for row in rows]  # noqa: E731
    assert picture(mask[0]) == ["xx......", "xx......", "xxxx....", "xxxx...."]  # noisy p p n n, then the cache
    assert picture(mask[1]) == ["xx......", "xx......", "..xxxx..", "..xxxx.."]
