"""A chunk of a prompt by training's kernel equals attention over the cache by XLA; nothing unseen is read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.decoding import prefix
from llada_jax.attention.decoding.cached import cached_attention
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm
from llada_jax.attention.visibility import block_window, dense_mask
from tests.attention.decoding.test_cached import stack
from tests.attention.test_kernel_compiled import TOPOLOGIES, compiled, shape, tpu


def test_the_mask_of_a_chunk():
    """Four tokens in blocks of two after two cached ones: own keys first, then the cache."""
    mask = np.asarray(dense_mask(block_window(jnp.array([2]), 2, 4), 4 + 3)[0]).astype(int)
    assert mask.tolist() == [[1, 1, 0, 0, 1, 1, 0]] * 2 + [[1, 1, 1, 1, 1, 1, 0]] * 2


@pytest.mark.parametrize(
    ("head_dim", "length", "filled"),
    [(128, 64, 40), (128, 64, 0), (128, 48, 48), (8, 64, 17)],  # 48: no whole chunks; 8: no whole registers
)
def test_equals_cached_attention(head_dim, length, filled):
    rng, chunk, block = np.random.default_rng(0), 40, 8
    sizes = (chunk, 4), (chunk, 2), (chunk, 2), (length, 2), (length, 2)
    query, key, value, *cached = (jnp.asarray(rng.normal(size=(1, *size, head_dim)), jnp.float32) for size in sizes)
    cached = [stack(x.at[:, filled:].set(1e30)) for x in cached]  # what is not filled yet may be anything
    angles = jnp.asarray(rng.normal(size=(2, 1, chunk, 4)), jnp.float32)
    rotary = QueryKeyRotary(*[RotaryNorm(jnp.ones(head_dim) / 4, *angles, 1e-6)] * 2)
    visibility = block_window(jnp.array([filled]), block, chunk)
    expected = cached_attention(*rotary.apply(query, key), value, *cached, 1, visibility)

    @jax.jit
    def run(query, key, value, *cached):
        plan = prefix.make_plan(visibility, length, 2, head_dim, interpret=True)
        return prefix.prefix_attention(query, key, value, *cached, 1, plan, rotary, interpret=True)

    assert np.allclose(run(query, key, value, *cached), expected, atol=1e-5)


@pytest.mark.parametrize("mesh", [dict(data=2), dict(tensor=2), dict(tensor=4)])
def test_over_a_mesh(mesh):
    """Rows on their devices, heads on theirs; with more ranks than key/value heads, each reads the one it needs."""
    rng, chunk, length = np.random.default_rng(1), 16, 64
    rows = mesh.get("data", 1)
    sizes = (chunk, 4), (chunk, 2), (chunk, 2), (length, 2), (length, 2)
    query, key, value, *cached = (jnp.asarray(rng.normal(size=(rows, *size, 128)), jnp.float32) for size in sizes)
    cached = [stack(x) for x in cached]
    visibility = block_window(jnp.array([40, 8][:rows]), 8, chunk)
    expected = cached_attention(query, key, value, *cached, 1, visibility)
    with jax.set_mesh(sharding.make_mesh(**{"data": 1} | mesh, devices=jax.devices()[: rows * mesh.get("tensor", 1)])):

        @jax.jit
        def run(visibility, *arrays):
            plan = prefix.make_plan(visibility, length, sharding.group_size(4, 2), 128, interpret=True)
            return prefix.prefix_attention(*arrays, 1, plan, interpret=True)

        found = run(visibility, query, key, value, *cached)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_the_filled_part_of_the_cache_is_copied_by_one_kernel(kind):
    """Of three layers' caches none is copied, sliced or transposed by XLA."""
    chunk, length, mesh = 512, 16384, tpu(kind)

    def attend(filled, query, key, value, *cache):
        plan = prefix.make_plan(block_window(filled, 32, chunk), length, 4, 128)
        return prefix.prefix_attention(query, key, value, *cache, 1, plan)

    key, cache = shape(1, chunk, 2, 128), shape(3, 1, 2, length, 128)
    arguments = shape(1, dtype=jnp.int32), shape(1, chunk, 8, 128), key, key, cache, cache
    with jax.set_mesh(mesh):
        program = compiled(mesh, attend, *arguments)
    assert len(re.findall(rf"%\w*{prefix.JOIN}[\w.]* = ", program.as_text())) == 2
    joined = 2 * 2 * (chunk + length) * 128 * 2  # of keys and values
    assert program.memory_analysis().temp_size_in_bytes < joined + 2 * length * 128 * 2


def test_refuses_several_rows_on_a_device():
    query, key, cache = jnp.ones((2, 16, 4, 128)), jnp.ones((2, 16, 2, 128)), jnp.ones((1, 2, 2, 64, 128))
    plan = prefix.make_plan(block_window(jnp.array([8, 8]), 8, 16), 64, 2, 128, interpret=True)
    assert prefix.takes(512, 1, 4) and not prefix.takes(512, 2, 4) and not prefix.takes(64, 1, 4)
    with pytest.raises(ValueError, match="2 rows, expected one on each device"):
        prefix.prefix_attention(query, key, key, cache, cache, 0, plan)
