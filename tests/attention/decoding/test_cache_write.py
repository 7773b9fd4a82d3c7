"""Blocks in a cache: by either path, what a loop in numpy writes."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.decoding.cache_rows import take_rows
from llada_jax.attention.decoding.cache_write import write_blocks


def arguments(rows, positions, head_dim, lanes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.normal(size=(2, rows, 2, 64, lanes)), dtype)
    block = jnp.asarray(rng.normal(size=(2, rows, 2, positions, head_dim)), dtype)
    at = jnp.asarray(positions * rng.integers(0, 64 // positions, rows), jnp.int32)
    return cache, block, at, jnp.asarray(rng.random(rows) < 0.6).at[0].set(True)


def written(cache, block, at, selected):
    expected = np.array(cache, np.float32)
    for row in np.flatnonzero(selected):
        place = slice(at[row], at[row] + block.shape[3])
        expected[:, row, :, place, : block.shape[4]] = np.asarray(block, np.float32)[:, row]
    return expected


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mesh", [None, dict(data=2, tensor=2)])
def test_writes_the_selected_rows(kernel, dtype, mesh):
    everything = arguments(4, 16, 128, 128, dtype)
    expected = written(*everything)
    run = jax.jit(lambda *arrays: write_blocks(*arrays, kernel=kernel, interpret=True))
    if mesh is None:
        found = run(*everything)
    else:
        with jax.set_mesh(sharding.make_mesh(**mesh, devices=jax.devices()[:4])):
            found = run(*everything)
    assert found.dtype == dtype and np.array_equal(np.asarray(found, np.float32), expected)


@pytest.mark.parametrize(("positions", "head_dim", "lanes"), [(8, 128, 128), (16, 64, 128), (16, 64, 64)])
def test_blocks_that_are_no_whole_tiles_are_written_too(positions, head_dim, lanes):
    everything = arguments(3, positions, head_dim, lanes)
    found = write_blocks(*everything, kernel=True, interpret=True)
    assert np.array_equal(found, written(*everything))


def test_nothing_to_write():
    cache, block, at, selected = arguments(3, 16, 128, 128)
    for kernel in (False, True):
        assert np.array_equal(write_blocks(cache, block, at, selected & False, kernel, interpret=True), cache)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("mesh", [None, dict(data=2, tensor=2)])
def test_a_chunk_goes_to_one_row_of_each_part(kernel, mesh):
    """Of six rows over two devices: to row 1 of the first, and to row 2 of the second, which is row 5."""
    cache, block, _, _ = arguments(6, 32, 128, 128)
    rows = jnp.array([1] if mesh is None else [1, 5])
    parts = len(rows)
    at, block = jnp.array([32, 16][:parts]), block[:, :parts]
    expected = np.array(cache)
    for i, row in enumerate(rows):
        expected[:, row, :, at[i] : at[i] + 32] = block[:, i]

    @jax.jit
    def run(cache, selected):
        return write_blocks(cache, block, at, selected, kernel=kernel, interpret=True, rows=rows)

    with nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(**mesh, devices=jax.devices()[:4])):
        assert np.array_equal(run(cache, jnp.ones(parts, bool)), expected)
        assert np.array_equal(run(cache, jnp.zeros(parts, bool)), cache)
        assert np.array_equal(jax.jit(take_rows)(cache, rows), cache[:, rows])
