"""The kernel of decoding equals attention over the cache by XLA, and dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.decoding import cached_kernel
from llada_jax.attention.decoding.cached import cached_attention
from llada_jax.attention.visibility import Visibility, block_window, two_block_window
from llada_jax.errors import InputError
from tests.attention.decoding.test_cached import stack


def operands(rng, rows, queries, length, heads, kv_heads, head_dim=8, dtype=jnp.float32):
    shapes = (queries, heads), (queries, kv_heads), (queries, kv_heads), (length, kv_heads), (length, kv_heads)
    q, k, v, ck, cv = (jnp.asarray(rng.normal(size=(rows, n, h, head_dim)), dtype) for n, h in shapes)
    return q, k, v, stack(ck), stack(cv), 1


def attend(arrays, visibility):
    """By the kernel, interpreted."""
    query, key, _, cached_key = arrays[:4]
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // (kv_heads * sharding.kv_copies(heads, kv_heads))

    @jax.jit
    def run(arrays, visibility):
        plan = cached_kernel.make_plan(visibility, cached_key.shape[3], group)
        return cached_kernel.cached_kernel_attention(*arrays, plan, interpret=True)

    return run(arrays, visibility)


def windows(starts, block, rng):
    yield block_window(starts, block)
    yield two_block_window(starts, block, jnp.asarray(rng.integers(0, 2, starts.shape), bool))


@pytest.mark.parametrize(
    "starts,heads,kv_heads,dtype,tolerance",
    [
        ([0, 48, 16, 7], 4, 2, jnp.float32, 1e-5),  # ragged: no cache, all of it, a chunk's end, within a chunk
        ([31], 4, 1, jnp.float32, 1e-5),  # one unit
        ([40, 0, 33], 2, 1, jnp.bfloat16, 2e-2),  # an odd number of units
    ],
)
def test_equals_cached_attention(monkeypatch, starts, heads, kv_heads, dtype, tolerance):
    monkeypatch.setattr(cached_kernel, "CHUNK", 32)  # of 48: the last one overlaps the first
    rng = np.random.default_rng(0)
    for visibility in windows(jnp.array(starts), 4, rng):
        arrays = operands(rng, len(starts), visibility.num_noisy, 48, heads, kv_heads, dtype=dtype)
        expected = cached_attention(*arrays, visibility)
        found = attend(arrays, visibility)
        assert found.dtype == dtype
        assert np.allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


def test_any_intervals_and_queries_that_see_nothing():
    rng = np.random.default_rng(1)
    bounds = (jnp.asarray(rng.integers(0, n, (3, 4)), jnp.int32) for n in (48, 48, 4, 4))
    visibility = Visibility(*bounds, num_noisy=4)
    arrays = operands(rng, 3, 4, 48, 4, 2)
    expected = cached_attention(*arrays, visibility)
    assert (np.abs(expected).max((2, 3)) == 0).any()
    assert np.allclose(attend(arrays, visibility), expected, atol=1e-5)


def test_a_cache_with_zeros_behind_the_heads():
    rng = np.random.default_rng(3)
    arrays = operands(rng, 2, 4, 48, 4, 2)
    padded = [jnp.pad(x, [(0, 0)] * 4 + [(0, 8)]) for x in arrays[3:5]]
    visibility = block_window(jnp.array([16, 31]), 4)
    found = attend((*arrays[:3], *padded, 1), visibility)
    assert np.allclose(found, cached_attention(*arrays, visibility), atol=1e-5)


def test_reads_no_chunk_beyond_the_rows_own_prefix(monkeypatch):
    monkeypatch.setattr(cached_kernel, "CHUNK", 16)
    ones = jnp.ones((2, 2, 2, 8))
    cache = jnp.ones((1, 2, 2, 64, 8)).at[:, 0, :, 16:].set(jnp.nan)  # the other row sees 60 positions
    found = attend((ones, ones, ones, cache, cache, 0), block_window(jnp.array([6, 60]), 2))
    assert np.allclose(found, 1)


@pytest.mark.parametrize("tensor,kv_heads", [(2, 2), (4, 2), (2, 1)])
def test_every_device_attends_with_its_own_rows_and_heads(tensor, kv_heads):
    rng = np.random.default_rng(2)
    visibility = two_block_window(jnp.array([8, 40, 16, 0]), 4, jnp.array([1, 0, 1, 0], bool))
    arrays = operands(rng, 4, 8, 48, 4, kv_heads)
    expected = cached_attention(*arrays, visibility)
    mesh = sharding.make_mesh(data=-1, tensor=tensor, devices=jax.devices()[: 2 * tensor])
    with jax.set_mesh(mesh):
        assert np.allclose(attend(arrays, visibility), expected, atol=1e-5)


def test_a_cache_that_cannot_be_read_is_refused():
    with pytest.raises(InputError, match="a cache of 40 positions, expected a multiple of 16; set"):
        cached_kernel.make_plan(block_window(jnp.array([8]), 8), 40, 2)
