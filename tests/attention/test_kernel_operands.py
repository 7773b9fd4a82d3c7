"""Heads in and out of the attention kernels: normalised, rotated, scaled and cut, interpreted, against plain JAX."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llada_jax import sharding
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.kernel import kernel_attention, kernel_plan
from llada_jax.attention.kernel_operands import cotangent_tiles, rows_of_tiles, tiles_of_rows
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm
from llada_jax.attention.visibility import block_diffusion, make_layout

INTERPRET = pltpu.InterpretParams()


def jitted(function, *arguments):
    """A function of arrays as one program."""
    return jax.jit(function)(*arguments)


def output_and_gradients(function, cotangent, *operands):
    out, vjp = jax.vjp(function, *operands)
    return out, vjp(cotangent)


def rotary_of(rng, batch, length, half, head_dim=None, dtype=jnp.float32):
    """With a weight where head_dim is given."""
    angle = rng.normal(size=(batch, length, half)).astype(np.float32)
    weight = None if head_dim is None else jnp.asarray(rng.normal(size=head_dim) + 1, dtype)
    return RotaryNorm(weight, jnp.cos(angle), jnp.sin(angle), 1e-6)


def plain(x, rotary, kv_heads, tile, scale):
    """tiles_of_rows by XLA."""
    x = (x if rotary is None else rotary(x)) * scale
    batch, length, heads, head_dim = x.shape
    x = x.reshape(batch, -1, tile, kv_heads, heads // kv_heads, head_dim).transpose(3, 0, 1, 4, 2, 5)
    return x.reshape(kv_heads, batch * length // tile, -1, head_dim)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("head_dim,half", [(16, 8), (16, 4), (128, 64), (128, 32)])
def test_rotated_tiles_and_their_gradients(head_dim, half, normed):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 24, 4, head_dim)), jnp.float32)
    rotary = rotary_of(rng, 2, 24, half, head_dim if normed else None)
    cotangent = jnp.asarray(rng.normal(size=(2, 2 * 24 // 8, 2 * 8, head_dim)), jnp.float32)
    expected, (expected_d_x, expected_d_rotary) = jitted(
        functools.partial(output_and_gradients, lambda x, rotary: plain(x, rotary, 2, 8, 0.3)), cotangent, x, rotary
    )
    found = jitted(lambda x, rotary: tiles_of_rows(x, 2, 8, "x", rotary, 0.3, INTERPRET), x, rotary)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    d_x, d_weight = jitted(
        lambda c, x, rotary: rows_of_tiles(c, x, 8, "x", rotary, 0.3, INTERPRET), cotangent, x, rotary
    )
    np.testing.assert_allclose(d_x, expected_d_x, atol=1e-5)
    assert (d_weight is None) == (not normed)
    if normed:
        np.testing.assert_allclose(d_weight, expected_d_rotary.weight, atol=1e-4)


@pytest.mark.parametrize("half", [32, 64])
def test_bfloat16_is_rounded_once(half):
    """The sums over channels go through a matrix unit of bfloat16, and are still those of float32."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 32, 2, 128)), jnp.bfloat16)
    rotary = rotary_of(rng, 1, 32, half, 128, jnp.bfloat16)
    cotangent = jnp.asarray(rng.normal(size=(2, 2, 16, 128)), jnp.bfloat16)
    exact, (d_x, d_rotary) = jitted(
        functools.partial(output_and_gradients, lambda x, rotary: plain(x, rotary, 2, 16, 1.0)),
        *jax.tree.map(jnp.float32, (cotangent, x, rotary)),
    )
    found = jitted(lambda x, rotary: tiles_of_rows(x, 2, 16, "x", rotary, 1.0, INTERPRET), x, rotary)
    found_d_x, d_weight = jitted(
        lambda c, x, rotary: rows_of_tiles(c, x, 16, "x", rotary, 1.0, INTERPRET), cotangent, x, rotary
    )
    for a, b in ((found, exact), (found_d_x, d_x)):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(d_weight, d_rotary.weight, rtol=1e-4, atol=1e-3)


def test_without_a_turn_rows_come_back():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(3, 16, 4, 8)), jnp.float32)
    tiles = tiles_of_rows(x, 2, 8, "x", interpret=INTERPRET)
    np.testing.assert_array_equal(tiles, plain(x, None, 2, 8, 1.0))
    np.testing.assert_array_equal(rows_of_tiles(tiles, jnp.zeros_like(x), 8, "x", interpret=INTERPRET)[0], x)


def test_cotangent_and_its_products_with_the_output():
    rng = np.random.default_rng(3)
    output, cotangent = (jnp.asarray(rng.normal(size=(2, 16, 4, 8)), jnp.float32) for _ in range(2))
    log_sum = jnp.asarray(rng.normal(size=(2, 4, 1, 16)), jnp.float32)
    tiles, statistics = cotangent_tiles(output, cotangent, log_sum, 8, INTERPRET)
    np.testing.assert_array_equal(tiles, plain(cotangent, None, 2, 8, 1.0))
    np.testing.assert_array_equal(statistics[:, :, :1], log_sum)
    sums = plain((output * cotangent).sum(-1, keepdims=True), None, 2, 8, 1.0)[..., 0]
    np.testing.assert_allclose(statistics[:, :, 1], sums, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}])
def test_attention_rotated_first_heads(sizes):
    """Rows that no tile divides; over a mesh the weights' gradients are summed over rows and heads."""
    rng = np.random.default_rng(4)
    visibility = block_diffusion(make_layout(jnp.asarray(np.sort(rng.integers(1, 3, (2, 11)), axis=1)), 4))
    shapes = (22, 4), (22, 2), (22, 2), (22, 4)
    query, key, value, cotangent = (jnp.asarray(rng.normal(size=(2, *shape, 8)), jnp.float32) for shape in shapes)
    rotary = QueryKeyRotary(rotary_of(rng, 2, 22, 4, 8), rotary_of(rng, 2, 22, 4, 8))

    def dense(query, key, value, rotary):
        return dense_attention(*rotary.apply(query, key), value, visibility)

    def ours(query, key, value, rotary):
        return kernel_attention(query, key, value, kernel_plan(visibility, 22, 2, 8, True), True, rotary=rotary)

    operands = query, key, value, rotary
    expected = jitted(functools.partial(output_and_gradients, dense), cotangent, *operands)
    mesh = jax.set_mesh(sharding.make_mesh(**sizes, devices=jax.devices()[:4])) if sizes else contextlib.nullcontext()
    with mesh:
        found = jitted(functools.partial(output_and_gradients, ours), cotangent, *operands)
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(tree) for tree in (found, expected)), strict=True):
        if not any(getattr(key, "name", "") in ("cos", "sin") for key in path):
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=jax.tree_util.keystr(path))
