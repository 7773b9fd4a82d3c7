"""Key intervals against a mask written cell by cell, and the blockwise path against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llada_jax
from llada_jax import sharding
from llada_jax.attention.blockwise import blockwise_attention
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.visibility import (
    BLOCK_ORIGINS,
    Visibility,
    block_causal,
    block_diffusion,
    dense_mask,
    make_layout,
)
from tests.attention.test_kernel import in_groups
from tests.helpers.environment import examples


def reference_mask(segments, block_size, block_origin):
    """Eq. 3, read literally."""
    n = len(segments)
    start = [max(j for j in range(i + 1) if j == 0 or segments[j - 1] != segments[i]) for i in range(n)]
    block = [(i - start[i] if block_origin == "document" else i) // block_size for i in range(n)]
    mask = np.zeros((2 * n, 2 * n), bool)
    for q in range(2 * n):
        for k in range(2 * n):
            i, j = q % n, k % n
            if segments[i] == 0 or segments[j] == 0:
                mask[q, k] = q == k
            elif segments[i] == segments[j]:
                noisy_q, noisy_k = q < n, k < n
                mask[q, k] = (
                    (noisy_q and noisy_k and block[i] == block[j])
                    or (noisy_q and not noisy_k and block[i] > block[j])
                    or (not noisy_q and not noisy_k and block[i] >= block[j])
                )
    return mask


@st.composite
def packed(draw):
    """Segments of a row of one of three lengths (each compiles a program), and a block size and origin."""
    n = draw(st.sampled_from([1, 9, 26]))
    ends = draw(st.lists(st.integers(1, n), max_size=4, unique=True))
    segments = 1 + np.searchsorted(np.sort(np.array(ends, int)), np.arange(n), side="right")
    segments[n - draw(st.integers(0, min(3, n - 1))) :] = 0
    return segments, draw(st.integers(1, n + 3)), draw(st.sampled_from(BLOCK_ORIGINS))


@settings(max_examples=60, deadline=None)
@given(packed())
def test_mask_is_equation_3(case):
    segments, block_size, origin = case
    mask = llada_jax.block_diffusion_mask(len(segments), block_size, segments, origin)
    assert np.array_equal(mask, reference_mask(segments, block_size, origin))


def test_every_query_sees_something_and_nothing_sees_padding():
    segments = np.array([1, 1, 1, 2, 2, 0, 0])
    mask = llada_jax.block_diffusion_mask(7, 2, segments)
    assert mask.any(1).all()
    padding = np.tile(segments == 0, 2)
    assert not mask[:, padding][~padding].any()


def test_density_without_documents_is_a_quarter():
    n, b = 64, 8
    assert llada_jax.block_diffusion_mask(n, b).sum() == n * n + n * b


def test_block_origins_differ_only_off_the_block_grid():
    aligned, ragged = np.repeat([1, 2], [8, 4]), np.repeat([1, 2, 3], [5, 7, 4])
    both = [llada_jax.block_diffusion_mask(12, 4, aligned, origin) for origin in BLOCK_ORIGINS]
    assert np.array_equal(*both)
    both = [llada_jax.block_diffusion_mask(16, 4, ragged, origin) for origin in BLOCK_ORIGINS]
    assert (both[0] != both[1]).sum() == 24


def test_block_size_is_data():
    compiled = jax.jit(lambda segments, b: dense_mask(block_diffusion(make_layout(segments, b)), 32))
    for b in (1, 3, 16, 2**30):
        mask = compiled(jnp.ones((1, 16), jnp.int32), b)[0]
        assert np.array_equal(mask, llada_jax.block_diffusion_mask(16, b))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0, 1), "length=0"),
        ((4, 0), "block_size=0"),
        ((4, 2, [1, 1, 2]), "segment_ids has shape"),
        ((4, 2, [1, 2, 2, 1]), "several pieces"),
        ((4, 2, [1, 1, -1, -1]), "-1"),
        ((4, 2, None, "row"), "block_origin"),
    ],
)
def test_bad_masks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        llada_jax.block_diffusion_mask(*arguments)


@settings(max_examples=examples(5, 50), deadline=None)
@given(
    st.sampled_from([(1, 20), (3, 130), (2, 256)]), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(1, 40),
    st.booleans(), st.integers(1, 4), st.integers(0, 100),
)  # fmt: skip
def test_blockwise_equals_dense(shape, heads, block_size, two_streams, group, seed):
    (batch, length), (heads, kv_heads) = shape, heads
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    layout = in_groups(make_layout(jnp.asarray(segments), block_size), group)
    visibility = block_diffusion(layout) if two_streams else block_causal(layout)
    keys = (1 + two_streams) * length

    def draw(n):
        return jnp.asarray(rng.normal(size=(batch, keys, n, 8)), jnp.float32)

    q, k, v, cotangent = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    results = [
        jax.jit(jax.value_and_grad(lambda q, k, v: (f(q, k, v, visibility) * cotangent).sum(), (0, 1, 2)))(q, k, v)  # noqa: B023
        for f in (dense_attention, blockwise_attention)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), *results)


def test_shards_of_rows_and_heads_work_on_their_own():
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (4, 96, heads, 16)) for k, heads in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.repeat(jnp.array([[1] * 20 + [2] * 28]), 4, axis=0)
    visibility = block_diffusion(make_layout(segments, 8))

    def output_and_gradient(attention):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.square(attention(*qkv, visibility)).sum(), (0, 1, 2)))

    expected = output_and_gradient(dense_attention)(query, key, value)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, expert=1, tensor=2)):
        found = output_and_gradient(blockwise_attention)(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), found, expected)


def test_a_query_without_keys_gives_zero_and_no_gradient():
    nothing = jnp.zeros((1, 3), jnp.int32)
    visibility = Visibility(nothing, nothing.at[0, 1].set(2), nothing, nothing, num_noisy=0)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    out, backward = jax.vjp(lambda q, k, v: blockwise_attention(q, k, v, visibility), x, x, x)
    assert not out[0, ::2].any() and out[0, 1].all()
    d_query, d_key, d_value = backward(jnp.ones_like(out))
    assert not d_query[0, ::2].any() and not d_key[0, 2].any() and jnp.isfinite(d_value).all()


def test_a_training_step_with_blockwise_attention_needs_less_than_half_the_memory():
    from llada_jax.bench.step import compiled_step
    from llada_jax.model.config import preset

    segments = np.ones((1, 1024), np.int32)
    dense, blockwise = (
        compiled_step(preset("tiny"), attention, segments, 32)[0].memory_analysis().temp_size_in_bytes
        for attention in ("dense", "blockwise")
    )
    assert blockwise < dense / 2


def test_blockwise_memory_grows_with_length_not_its_square():
    def temporaries(function, length):
        layout = make_layout(jnp.ones((1, length), jnp.int32), 32)
        x = jax.ShapeDtypeStruct((1, 2 * length, 4, 32), jnp.float32)

        def loss(q, k, v):
            return function(q, k, v, block_diffusion(layout)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    growth = temporaries(blockwise_attention, 2048) / temporaries(blockwise_attention, 1024)
    assert growth < 2.5
    assert temporaries(dense_attention, 2048) > 4 * temporaries(blockwise_attention, 2048)
