"""The parameters of a model, in their three forms, all made from the declarations of model/declarations.py:

  in memory:     a tree {"embedding", "dense": {...}, "sparse": {...}, "final_norm", "head"}; the layers of a group
                 are stacked along a leading axis, for `lax.scan`.
  in decoding:   the same tree with attention's weights as matrices (join_heads): query [layers, embed, heads *
                 head_dim], output [layers, heads * head_dim, embed]. Of such a stack XLA on TPUs reads a layer in
                 place; of the form in memory, whose tiles are of one input and several heads, it makes a copy.
  in checkpoints: a flat dict with one leaf per layer, "layers.007.query", experts of a layer together [E, in, out].
Matrices are stored [in, out], ready for `x @ w`; Hugging Face stores [out, in].
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax import sharding
from llada_jax.model.config import ModelConfig
from llada_jax.model.declarations import (
    Declarations,
    Parameter,
    adaptable,
    declare,
    is_parameter,
    layer_axes,
    leaf_name,
    leaves,
)
from llada_jax.model.lora import Lora

__all__ = [
    "Declarations", "Parameter", "Params", "abstract", "adaptable", "count", "declare", "decayed", "initialize",
    "is_parameter", "join_abstract", "join_heads", "layer_axes", "leaf_name", "leaves", "logical_axes", "split_heads",
    "stack", "stacked_map", "trainable", "unstack",
]  # fmt: skip

Params = dict[str, "jax.Array | dict[str, jax.Array]"]  # weights in memory: the tree of the module's docstring


def stacked_map(function: Callable[[Parameter, tuple[int, ...]], Any], config: ModelConfig | Lora) -> dict:
    """Returns the tree of `function(declaration, leading)`; leading is () or (number of layers of the group,)."""
    groups = config.layer_groups

    def visit(name, node):
        leading = (len(groups[name]),) if name in groups else ()
        return jax.tree.map(lambda p: function(p, leading), node, is_leaf=is_parameter)

    return {name: visit(name, node) for name, node in declare(config).items()}


def abstract(config: ModelConfig | Lora, dtype=jnp.float32) -> dict:
    """Tree of jax.ShapeDtypeStruct, stacked as in memory."""
    return stacked_map(lambda p, leading: jax.ShapeDtypeStruct(leading + p.shape, dtype), config)


def logical_axes(config: ModelConfig | Lora) -> dict:
    """Tree of logical axis names, stacked as in memory; `sharding.spec` maps them to mesh axes."""
    return stacked_map(lambda p, leading: ("layers",) * len(leading) + p.axes, config)


def trainable(config: ModelConfig | Lora) -> dict:
    """Tree of Parameter.trainable, stacked as in memory."""
    return stacked_map(lambda p, _: p.trainable, config)


def decayed(config: ModelConfig | Lora) -> dict:
    """Tree of Parameter.decayed, stacked as in memory."""
    return stacked_map(lambda p, _: p.decayed, config)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def initialize(config: ModelConfig | Lora, key: jax.Array, dtype=jnp.float32) -> Params:
    """Returns random weights, stacked: N(0, initializer_range); ones for norms; zeros for biases and an adapter's B.

    Example:
        >>> import jax, llada_jax
        >>> params = llada_jax.init(llada_jax.preset("tiny"), jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        918656
    """
    leaves, treedef = jax.tree.flatten(stacked_map(lambda p, leading: (p, leading), config), is_leaf=_is_pair)
    keys = jax.random.split(key, len(leaves))

    def draw(key, pair):
        parameter, leading = pair
        shape = leading + parameter.shape
        if parameter.init == "normal":
            return (config.initializer_range * jax.random.normal(key, shape)).astype(dtype)
        return jnp.full(shape, 1.0 if parameter.init == "ones" else 0.0, dtype)

    return jax.tree.unflatten(treedef, [draw(k, pair) for k, pair in zip(keys, leaves, strict=True)])


def _is_pair(x) -> bool:
    return isinstance(x, tuple) and is_parameter(x[0])


def count(config: ModelConfig | Lora) -> int:
    """Number of scalars."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def unstack(tree: dict, config: ModelConfig | Lora) -> dict:
    """In-memory tree -> flat dict with one leaf per layer, as in checkpoints. Takes any tree of that structure."""
    groups = config.layer_groups
    flat = {leaf_name(name): value for name, value in tree.items() if name not in groups}
    for group, layers in groups.items():
        for row, layer in enumerate(layers):
            flat |= {leaf_name(name, layer): value[row] for name, value in tree[group].items()}
    return flat


def stack(flat: dict, config: ModelConfig | Lora) -> Params:
    """Inverse of unstack; leaves may be numpy or jax arrays."""
    groups = config.layer_groups
    tree = {name: flat[leaf_name(name)] for name in declare(config) if name not in groups}
    for group, layers in groups.items():
        names = declare(config)[group]
        tree[group] = {name: jnp.stack([flat[leaf_name(name, layer)] for layer in layers]) for name in names}
    return tree


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
        axes = layer_axes(config, group, params[group])
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
