"""The mesh, and the one table from logical axes to mesh axes.

Mesh axes: "data" (replicas), "fsdp" (parameters and optimizer state split, gathered for use), "expert", "tensor"; any
may be 1. XLA places the collectives (Auto axes); shard_map is used only where a program must speak of ranks.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llada_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axes. A dimension that the axes do not divide stays whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "layers": (),
}


def make_mesh(data: int = -1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Mesh over all devices; one size may be -1 ("what is left"). Raises InputError when the product is wrong."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(MESH_AXES, (data, fsdp, expert, tensor), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        raise InputError(f"mesh {sizes} does not match {len(devices)} devices")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes on `mesh` (concrete or abstract)."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(axis, ()) if mesh.shape[name] > 1)
        divides = names and size % math.prod(mesh.shape[name] for name in names) == 0
        entries.append(names if divides else None)
    return PartitionSpec(*entries)


def shardings(abstract, logical_axes, mesh: Mesh):
    """Tree of NamedSharding for a tree of shaped values and the tree of their logical axes."""
    return jax.tree.map(lambda leaf, axes: NamedSharding(mesh, spec(axes, leaf.shape, mesh)), abstract, logical_axes)


def mesh_in_force():
    """The mesh of `jax.set_mesh` when it has several devices, else None: then there is nothing to share out."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks XLA to lay x out by its logical axes on the mesh in force (`jax.set_mesh`); without one, x unchanged."""
    if (mesh := mesh_in_force()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def over_batch(function):
    """`function(x, weights)` run by each shard of the batch on its own rows, weights gathered.

    Sorting tokens by expert is then local; without a mesh in force, or when the batch does not divide, it is the plain
    function.
    """

    def call(x, weights):
        if (mesh := mesh_in_force()) is None:
            return function(x, weights)
        batch = spec(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh)
        whole = jax.tree.map(lambda _: PartitionSpec(), weights)
        return jax.shard_map(function, in_specs=(batch, whole), out_specs=batch, check_vma=False)(x, weights)

    return call


def over_heads(attention):
    """`attention(query, key, value, mask)` run by each shard of the batch and of the key/value heads on its own part.

    query [batch, queries, heads, head_dim], key and value [batch, keys, kv_heads, head_dim]: query heads split as
    key/value heads do, or their groups would be torn apart. mask: a tree of arrays that lead with the batch.
    """

    def call(query, key, value, mask):
        if (mesh := mesh_in_force()) is None:
            return attention(query, key, value, mask)
        heads = spec(("batch", None, "kv_heads", None), key.shape, mesh)
        specs = (heads, heads, heads, PartitionSpec(heads[0]))
        return jax.shard_map(attention, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, mask)

    return call
