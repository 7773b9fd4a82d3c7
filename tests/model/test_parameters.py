"""Attention's weights as matrices: the same pass, on one device and over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.visibility import block_window
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import forward, hidden_states
from llada_jax.model.lora import Lora
from llada_jax.model.parameters import join_abstract, join_heads, split_heads

TINY = preset("tiny")


def with_adapters(params, config):
    adapters = parameters.initialize(Lora(config, 2, 2.0, ("query", "output")), jax.random.key(1))
    return params | {group: params[group] | adapters[group] for group in config.layer_groups}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("config", [TINY, TINY.replace(qkv_bias=True)], ids=["plain", "biases"])
def test_a_pass_is_the_same(config, adapted):
    params = parameters.initialize(config, jax.random.key(0))
    params = with_adapters(params, config) if adapted else params
    joined = join_heads(params, config)
    tokens = jnp.arange(24, dtype=jnp.int32)[None] % 50
    assert all(joined[group]["query"].ndim == 3 for group in config.layer_groups)
    np.testing.assert_allclose(forward(joined, config, tokens), forward(params, config, tokens), atol=1e-6)


def test_split_is_the_inverse():
    params = parameters.initialize(TINY, jax.random.key(0))
    for group in TINY.layer_groups:
        axes = parameters.layer_axes(TINY, group, params[group])
        for name, w in join_heads(params, TINY)[group].items():
            assert np.array_equal(split_heads(w[0], axes[name], TINY.head_dim), params[group][name][0])


@pytest.mark.parametrize("mesh", [dict(tensor=2), dict(tensor=8), dict(fsdp=4, tensor=2)])
def test_over_a_mesh_heads_stay_whole(mesh):
    """Also where the tensor axis is larger than the number of key/value heads, and their width would divide."""
    params, batch = parameters.initialize(TINY, jax.random.key(0)), 8
    tokens = jnp.arange(8 * batch, dtype=jnp.int32).reshape(batch, 8) % 50
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)
    visibility = block_window(jnp.zeros(batch, jnp.int32), 8)
    empty = (batch, TINY.num_kv_heads, 16, TINY.head_dim)
    cache = {
        group: {name: jnp.zeros((len(layers), *empty)) for name in ("key", "value")}
        for group, layers in TINY.layer_groups.items()
    }

    def run(params):
        return hidden_states(params, TINY, tokens, positions, visibility, cache=cache)[0]

    expected = run(params)
    mesh = sharding.make_mesh(data=-1, **mesh)
    with jax.set_mesh(mesh):
        layout = sharding.shardings(params, parameters.logical_axes(TINY), mesh)
        placed = jax.device_put(params, layout)
        joined = jax.jit(join_heads, static_argnums=1)(placed, TINY)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)
        declarations = jax.tree.leaves(join_abstract(abstract, TINY))
        for leaf, declared in zip(jax.tree.leaves(joined), declarations, strict=True):
            assert leaf.shape == declared.shape and leaf.sharding.is_equivalent_to(declared.sharding, leaf.ndim)
        found = jax.jit(run)(joined)
    np.testing.assert_allclose(found, expected, atol=2e-6)
