"""The mesh, and the table from logical axes to mesh axes.

Mesh axes: "data" (replicas), "fsdp" (parameters and optimizer state split, gathered for use), "expert", "context" (the
tokens of a row split, attention/context.py), "tensor"; any may be 1. XLA places the collectives (Auto axes); shard_map
is used only where a program must address ranks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llada_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis -> mesh axes. A dimension takes the first ones that divide it and that no earlier dimension has taken.
# Experts come before "embed": whole experts are then gathered for use, without a transposition.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert", "fsdp", "context"),
    "layers": (),
}


GATHERED = "gathered_weight"  # name of gathered weights in remat policies: keeping them would undo "fsdp"


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh over all devices with axes MESH_AXES. One size may be -1: the devices that the others leave.

    devices: by default jax.devices(). Raises InputError if the product is not the number of devices, or if "data" is
    not a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(MESH_AXES, (data, fsdp, expert, context, tensor), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        raise InputError(f"mesh {sizes} does not match {len(devices)} devices")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise InputError(f"mesh.data={sizes['data']}: {slices} slices are joined along it, expected a multiple of them")
    inner = sizes | {"data": sizes["data"] // slices}
    shape = tuple(inner.values())
    try:
        places = _places(shape, devices, slices)
    except NotImplementedError:  # some axis must take a part of a side of the torus
        if sizes["context"] > 1:
            # Experts are gathered over fsdp, expert and context together. Where these do not go through the torus in
            # the order in which a single axis would, libtpu makes all-reduces of the gathers.
            shape = inner["data"], math.prod(shape[1:4]), sizes["tensor"]
        places = _places(shape, devices, slices, allow_split_physical_axes=True)
    return Mesh(places.reshape(tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _places(shape: tuple[int, ...], devices: Sequence[jax.Device], slices: int, **how) -> np.ndarray:
    """The devices of each slice in `shape`; slices are joined along the first axis."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices=list(devices), **how)
    outer = (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(shape, dcn_mesh_shape=outer, devices=list(devices), **how)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes and shape on `mesh` (concrete or abstract)."""
    entries, taken = [], set()
    for axis, size in zip(axes, shape, strict=True):
        free = [name for name in RULES.get(axis, ()) if mesh.shape[name] > 1 and name not in taken]
        while size % math.prod(mesh.shape[name] for name in free):
            free.pop()
        taken |= set(free)
        entries.append(tuple(free) or None)
    return PartitionSpec(*entries)


def shardings(abstract, logical_axes, mesh: Mesh):
    """Returns a tree of NamedSharding for a tree of shaped values and the tree of their logical axes."""
    return jax.tree.map(lambda leaf, axes: NamedSharding(mesh, spec(axes, leaf.shape, mesh)), abstract, logical_axes)


def mesh_in_force() -> AbstractMesh | None:
    """Returns the mesh of `jax.set_mesh` if it has several devices, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrains x to the sharding of its logical axes on the mesh in force; without a mesh, returns x."""
    if (mesh := mesh_in_force()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def replicated(tree):
    """Constrains each array of a tree to be whole on every device; without a mesh, returns the tree."""
    if mesh_in_force() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def gathered(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Returns a weight as matmuls use it: gathered over "fsdp", still split over "tensor". axes: its logical axes."""
    whole = tuple(None if axis == "embed" else axis for axis in axes)
    mesh = mesh_in_force()
    # A constraint that changes nothing would still be a copy, between a stack of layers and the matmul that reads it.
    if mesh is not None and spec(whole, w.shape, mesh) != spec(axes, w.shape, mesh):
        w = constrain(w, whole)
    return checkpoint_name(w, GATHERED)


@dataclasses.dataclass(frozen=True)
class WeightShards:
    """What a function under `over_batch` knows about the mesh: the size of each axis, how each weight is split, and the
    axes over which the tokens are.

    Without a mesh all sizes are 1 and `gather` returns its argument.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    specs: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    reduce_dtype: str | None = None
    token_axes: tuple[str, ...] = ()

    def size(self, axis: str) -> int:
        return self.sizes.get(axis, 1)

    def gather(self, x: jax.Array, name: str, keep: Sequence[str] = ()) -> jax.Array:
        """Gathers x, an array split as weight `name` is. It stays split over the mesh axes in `keep`.

        The axes of one dimension are gathered together. The gradient is reduce-scattered in reduce_dtype, by default
        that of x: each rank accumulated its own part in float32 and rounded it once.
        """
        for dimension, axes in enumerate(self.specs.get(name, ())):
            if axes := tuple(axis for axis in axes_of(axes) if axis not in keep):
                x = gather_axes(x, axes, dimension, self.reduce_dtype)
        return checkpoint_name(x, GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_axes(x: jax.Array, axes: tuple[str, ...], dimension: int, reduce_dtype: str | None = None) -> jax.Array:
    """Under shard_map, x gathered along a dimension split over `axes`; the gradient is that of WeightShards.gather."""
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)


def _gather_axes_forward(x, axes, dimension, reduce_dtype):
    return gather_axes(x, axes, dimension, reduce_dtype), None


def _gather_axes_backward(axes, dimension, reduce_dtype, _, cotangent):
    parts = cotangent.astype(reduce_dtype or cotangent.dtype)
    return (jax.lax.psum_scatter(parts, axes, scatter_dimension=dimension, tiled=True).astype(cotangent.dtype),)


gather_axes.defvjp(_gather_axes_forward, _gather_axes_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Under `over_batch`, the sum of x over the ranks of a mesh axis, where the result is the same on all of them."""
    return jax.lax.psum(x, axis)


def _sum_over_forward(x, axis):
    return sum_over(x, axis), None


def _sum_over_backward(axis, _, cotangent):
    # shard_map gives each rank its share, 1 / size, of the cotangent of a result that is the same on all.
    return (cotangent * jax.lax.axis_size(axis),)


sum_over.defvjp(_sum_over_forward, _sum_over_backward)


@jax.custom_vjp
def gradients_together(tree):
    """Returns the tree; in the backward pass none of its gradients is used before all of them are computed.

    For weights that are used once, together with the input of that use. XLA would otherwise sum their gradients over
    ranks only after the loop over the layers, which comes next in the backward pass, and keep them whole until then.
    """
    return tree


def _gradients_together_forward(tree):
    # Frozen leaves have no gradient: waiting for one would compute it. () and None are static under tracing.
    has_gradient = tuple(() if leaf.perturbed else None for leaf in jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: leaf.value, tree), has_gradient


def _gradients_together_backward(has_gradient, cotangents):
    leaves, structure = jax.tree.flatten(cotangents)
    leaves = [jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in leaves]
    joint = iter(jax.lax.optimization_barrier([d for d, w in zip(leaves, has_gradient, strict=True) if w is not None]))
    return (structure.unflatten(d if w is None else next(joint) for d, w in zip(leaves, has_gradient, strict=True)),)


gradients_together.defvjp(_gradients_together_forward, _gradients_together_backward, symbolic_zeros=True)


def over_batch(function: Callable, axes: Mapping[str, tuple], reduce_dtype: str | None = None) -> Callable:
    """Wraps `function(x, weights, shards)` in shard_map: each shard runs it on its own tokens and weight parts.

    x: an array or a tree of arrays with leading axes batch and length; results must have them too. weights: a dict;
    axes: the logical axes of each weight. `shards.gather` returns a whole weight. reduce_dtype: as in WeightShards.
    Without a mesh in force the function runs unwrapped. A batch that the mesh does not divide is whole on every shard.
    """

    def call(x, weights):
        if (mesh := mesh_in_force()) is None:
            return function(x, weights, WeightShards())
        shape = jax.tree.leaves(x)[0].shape[:2]
        tokens, token_axes = spec(("batch", "length"), shape, mesh), split_over(("batch", "length"), shape, mesh)
        specs = {name: spec(axes[name], w.shape, mesh) for name, w in weights.items()}
        local = functools.partial(function, shards=WeightShards(dict(mesh.shape), specs, reduce_dtype, token_axes))
        return jax.shard_map(local, in_specs=(tokens, specs), out_specs=tokens, check_vma=False)(x, weights)

    return call


def kv_copies(heads: int, kv_heads: int) -> int:
    """Returns how often each key/value head must be repeated so that the tensor axis can split them; 1: not at all."""
    mesh = mesh_in_force()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    return tensor // kv_heads if tensor % kv_heads == 0 and heads % tensor == 0 and tensor > kv_heads else 1


def group_size(heads: int, kv_heads: int) -> int:
    """Query heads per key/value head, on a device."""
    return heads // (kv_heads * kv_copies(heads, kv_heads))


def split_over(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that `spec` of the same arguments names."""
    return tuple(name for entry in spec(axes, shape, mesh) for name in axes_of(entry))


def num_parts(axis: str, size: int) -> int:
    """Into how many parts the mesh in force splits an array's logical axis of this size; 1 without a mesh."""
    mesh = mesh_in_force()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in split_over((axis,), (size,), mesh))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def tokens_joined(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the spec of arrays that concatenate one part per shard of a [batch, length, ...] array of this shape."""
    return PartitionSpec(split_over(("batch", "length"), shape[:2], mesh) or None)


def over_heads(attention: Callable, joined: bool = False) -> Callable:
    """Wraps `attention(query, key, value, mask, crosses, *rotary)` in shard_map over tokens and key/value heads.

    query [batch, queries, heads, head_dim]; key, value [batch, keys, kv_heads, head_dim]. Query heads are split as
    key/value heads are, to keep groups together. A tensor axis larger than kv_heads gets copies of the key/value heads
    (kv_copies), one per rank. mask: a tree of arrays with leading axes batch and queries, or `joined` (tokens_joined).
    crosses: attention/context.blocks_cross of the mask. rotary: trees of arrays with leading axes batch and length, or
    of vectors, which every shard gets whole.
    """

    def call(query, key, value, mask, crosses=None, *rotary):
        if (mesh := mesh_in_force()) is None:
            return attention(query, key, value, mask, crosses, *rotary)
        if (copies := kv_copies(query.shape[2], key.shape[2])) > 1:
            key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
        heads = spec(("batch", "length", "kv_heads", None), key.shape, mesh)
        masks = tokens_joined(key.shape, mesh) if joined else PartitionSpec(*heads[:2])
        angles = jax.tree.map(lambda x: PartitionSpec(*heads[:2]) if x.ndim > 1 else PartitionSpec(), rotary)
        specs = (heads, heads, heads, masks, PartitionSpec(), *angles)
        run = jax.shard_map(attention, in_specs=specs, out_specs=heads, check_vma=False)
        return run(query, key, value, mask, crosses, *rotary)

    return call
