"""The weights of attention as matrices, for passes of decoding.

    query, key, value   [layers, embed, heads, head_dim] -> [layers, embed, heads * head_dim]
    output              [layers, heads, head_dim, embed] -> [layers, heads * head_dim, embed]

Of such a stack XLA on TPUs reads a layer in place. Of the form in memory, whose tiles are of one input and several
heads, it copies the layer and lays it anew in every pass.
"""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax import sharding
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import Params


def join_heads(params: Params, config: ModelConfig) -> Params:
    """Returns the weights with those of attention, and of their adapters, joined. `forward` takes either form."""

    def join(w, axes):
        shape, entries = _joined(axes, w.shape)
        joined = w.reshape(shape)
        return joined if entries is None else jax.lax.with_sharding_constraint(joined, entries)

    return _map_heads(join, params, config)


def join_abstract(params: Params, config: ModelConfig) -> Params:
    """join_heads of jax.ShapeDtypeStruct, laid out over the mesh in force."""

    def join(w, axes):
        shape, entries = _joined(axes, w.shape)
        layout = w.sharding if entries is None else NamedSharding(w.sharding.mesh, entries)
        return jax.ShapeDtypeStruct(shape, w.dtype, sharding=layout)

    return _map_heads(join, params, config)


def split_heads(w: jax.Array, axes: tuple[str | None, ...], head_dim: int) -> jax.Array:
    """The inverse, of one layer's weight with these logical axes; one that is not joined is returned as it is."""
    if w.ndim == len(axes):
        return w
    at = _head_dim_axis(axes)
    return w.reshape(*w.shape[: at - 1], -1, head_dim, *w.shape[at:])


def _map_heads(function: Callable, params: Params, config: ModelConfig) -> Params:
    """The tree with function(weight, logical axes of the stack) for each weight that has heads beside inputs."""
    joined = dict(params)
    for group in config.layer_groups:
        axes = parameters.layer_axes(config, group, params[group])
        joined[group] = {
            name: function(w, ("layers", *axes[name])) if len(axes[name]) == 3 and _head_dim_axis(axes[name]) else w
            for name, w in params[group].items()
        }
    return joined


def _head_dim_axis(axes: tuple[str | None, ...]) -> int:
    """The axis after that of the heads; 0 if there are no heads."""
    return next((i + 1 for i, axis in enumerate(axes) if axis in ("heads", "kv_heads")), 0)


def _joined(axes, shape) -> tuple[tuple[int, ...], PartitionSpec | None]:
    """The joined shape, and its layout on the mesh in force: heads stay whole."""
    at, mesh = _head_dim_axis(axes), sharding.mesh_in_force()
    joined = *shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :]
    if mesh is None:
        return joined, None
    entries = sharding.spec(axes, shape, mesh)
    return joined, PartitionSpec(*entries[:at], *entries[at + 1 :])
