"""A layer's attention by the kernels that read its weights in place, against the same pass in plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.decoding import layer as decoding_layer
from llada_jax.attention.visibility import two_block_window
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution, hidden_states
from llada_jax.model.parameters import join_heads

BLOCK, LENGTH, BATCH = 16, 64, 4


def model(**changes):
    sizes = dict(hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=128, num_layers=2)
    return preset("tiny").replace(**sizes | changes)


def arguments(config, dtype, seed=0):
    """(params, tokens, positions, visibility, cache) of a pass over two blocks per row, some rows without the first."""
    rng = np.random.default_rng(seed)
    params = parameters.initialize(config, jax.random.key(seed), dtype)
    for group in config.layer_groups:  # ones would hide a norm that is left out
        for name, w in params[group].items():
            if name.endswith("norm"):
                params[group][name] = jnp.asarray(rng.uniform(0.5, 1.5, w.shape), dtype)
    start = jnp.asarray(BLOCK * rng.integers(1, LENGTH // BLOCK, BATCH), jnp.int32)
    visibility = two_block_window(start, BLOCK, jnp.asarray(rng.random(BATCH) < 0.5))
    positions = start[:, None] - BLOCK + jnp.arange(2 * BLOCK)[None]
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, positions.shape), jnp.int32)
    shape = BATCH, config.num_kv_heads, LENGTH, config.head_dim
    cache = {
        group: {name: jnp.asarray(rng.normal(size=(len(layers), *shape)), dtype) for name in ("key", "value")}
        for group, layers in config.layer_groups.items()
    }
    return params, tokens, positions, visibility, cache


def both_ways(config, params, *rest, cache):
    """Hidden states, keys and values, in plain operations and by the kernels."""
    plain = hidden_states(params, config, *rest, cache=cache)
    execution = Execution(attention="kernel", interpret=True)
    return plain, hidden_states(join_heads(params, config), config, *rest, execution, cache=cache)


@pytest.fixture
def layers_run(monkeypatch):
    """How many layers the kernels ran, as traced."""
    calls, run = [], decoding_layer.attention_layer
    monkeypatch.setattr(decoding_layer, "attention_layer", lambda *a, **k: calls.append(1) or run(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance"),
    [({}, jnp.float32, 1e-5), (dict(qk_norm=True), jnp.float32, 1e-5), (dict(qk_norm=True), jnp.bfloat16, 4e-2),
     (dict(num_kv_heads=4, num_heads=8, qk_norm=True), jnp.float32, 1e-5)],
)  # fmt: skip
def test_equals_plain_operations(changes, dtype, tolerance, layers_run):
    config = model(**changes)
    params, *rest, cache = arguments(config, dtype)
    plain, kernel = both_ways(config, params, *rest, cache=cache)
    assert layers_run
    for expected, found in zip(*map(jax.tree.leaves, (plain, kernel)), strict=True):
        expected, found = (np.asarray(x, np.float32) for x in (expected, found))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("mesh", [dict(data=2, tensor=2), dict(tensor=4), dict(expert=4)])
def test_over_a_mesh(mesh, layers_run):
    """Heads over the tensor axis, also where it is larger than the number of key/value heads."""
    config = model(qk_norm=True)
    params, *rest, cache = arguments(config, jnp.float32)
    expected = hidden_states(params, config, *rest, cache=cache)
    sizes = {"data": 1} | mesh
    execution = Execution(attention="kernel", interpret=True)
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])):
        run = jax.jit(lambda params, *rest: hidden_states(params, config, *rest, execution, cache=cache))
        found = run(join_heads(params, config), *rest)
    assert layers_run
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(a).max()


@pytest.mark.parametrize("changes", [dict(head_dim=64), dict(qkv_bias=True)])
def test_what_the_kernels_do_not_take_runs_in_plain_operations(changes, layers_run):
    config = model(**changes)
    params, *rest, cache = arguments(config, jnp.float32)
    lanes = {name: jnp.pad(x, [(0, 0)] * 4 + [(0, 128 - config.head_dim)]) for name, x in cache["dense"].items()}
    plain = hidden_states(params, config, *rest, cache=cache)
    execution = Execution(attention="kernel", interpret=True)
    kernel = hidden_states(join_heads(params, config), config, *rest, execution, cache={"dense": lanes})
    assert not layers_run
    np.testing.assert_allclose(kernel[0], plain[0], atol=1e-5)


def test_sizes_that_fit():
    sizes = decoding_layer.Heads(heads=4, kv_heads=2, head_dim=128)
    assert decoding_layer.fits(sizes, 2, 32, 256, jnp.float32, interpret=True)
    for other, positions, embed in ((sizes, 8, 256), (sizes, 32, 192), (sizes._replace(head_dim=64), 32, 256)):
        assert not decoding_layer.fits(other, 2, positions, embed, jnp.float32, interpret=True)
