"""The projections' kernel against plain products, over blocks of rows and tiles of columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.attention.decoding import projections
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm, rms_norm
from llada_jax.chips import parse_topology
from llada_jax.pod.topology import one_device

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(projections, "MOST_ROWS", 32)
    monkeypatch.setattr(projections, "MOST_COLUMNS", 256)


@pytest.mark.parametrize("outputs", [128, 384, 768])
@pytest.mark.parametrize(("batch", "positions"), [(1, 16), (4, 16), (3, 32)])
def test_project(batch, positions, outputs, small_blocks):
    """Also with one tile, of which one core has nothing, and with more tiles than a core can have under way."""
    x, stack = normal(batch, positions, 256), normal(2, 256, outputs)
    found = projections.project(x, stack, jnp.int32(1), interpret=True)
    np.testing.assert_allclose(found, x @ stack[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [16, 64])
@pytest.mark.parametrize("batch", [1, 4])
def test_project_heads(batch, rotated, normed, small_blocks):
    positions, embed, heads, kv_heads, head_dim = 16, 128, 4, 2, 128
    x, norm = normal(batch, positions, embed), normal(embed)
    stacks = [normal(3, embed, count * head_dim) for count in (heads, kv_heads, kv_heads)]
    angle = normal(batch, positions, rotated)
    weights = [normal(head_dim) if normed else None for _ in range(2)]
    rotary = QueryKeyRotary(*(RotaryNorm(weight, jnp.cos(angle), jnp.sin(angle), 1e-6) for weight in weights))
    query, key, value = projections.project_heads(x, norm, stacks, jnp.int32(2), rotary, head_dim, interpret=True)
    h = rms_norm(x, norm, 1e-6)
    expected = [(h @ stack[2]).reshape(batch, positions, -1, head_dim) for stack in stacks]
    expected[:2] = rotary.apply(*expected[:2])
    np.testing.assert_allclose(query, expected[0].reshape(query.shape), rtol=1e-4, atol=1e-4)
    for found, wanted in ((key, expected[1]), (value, expected[2])):
        np.testing.assert_allclose(found, wanted.swapaxes(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("topology", "batch", "inputs", "outputs", "expected"),
    [
        ("v5p:2x2x1", 4, 2048, [2048, 512, 512], (256, 512)),  # LLaDA2.0-mini, 16 requests on four chips
        ("v5p:2x2x1", 16, 2048, [2048, 512, 512], (512, 512)),
        ("v5p:2x2x1", 16, 2048, [512, 128, 128], (512, 128)),  # its heads split over four chips
        ("v5p:2x2x2", 2, 4096, [4096, 512, 512], (128, 512)),  # -flash
        ("v4:2x2x1", 4, 2048, [2048, 512, 512], (128, 512)),  # 16 MiB of fast memory
        ("v4:2x2x1", 4, 4096, [4096, 512, 512], (64, 256)),
        ("v4:2x2x1", 4, 16384, [2048, 512, 512], None),
    ],
)
def test_tilings(topology, batch, inputs, outputs, expected):
    with jax.set_mesh(one_device(parse_topology(topology))):
        assert projections.tiling(batch, 64, inputs, outputs, 128, jnp.bfloat16) == expected


def test_sizes_must_be_whole_registers():
    for positions, inputs, unit in ((8, 256, 128), (16, 192, 128), (16, 256, 64)):
        assert projections.tiling(2, positions, inputs, [256], unit, jnp.bfloat16, interpret=True) is None
    assert projections.tiling(2, 16, 256, [256], 128, jnp.bfloat16, interpret=True) == (32, 256)
