"""The attention of a layer in decoding, by kernels that read its weights and its cache in place.

What `forward` computes from the same weights in plain operations, in three: projections, attention, output.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention.decoding import projections
from llada_jax.attention.decoding.cached import CACHE_AXES, SCOPE
from llada_jax.attention.decoding.cached_kernel import CachedPlan, attention_of_device, make_plan
from llada_jax.attention.rotary import QueryKeyRotary
from llada_jax.attention.visibility import Visibility

PROJECTIONS = ("query", "key", "value", "output")


class Heads(NamedTuple):
    """Sizes of a model's attention."""

    heads: int
    kv_heads: int
    head_dim: int


def reader(
    weights: Mapping[str, jax.Array], sizes: Heads, visibility: Visibility, cache: Sequence[jax.Array], x: jax.Array,
    interpret: bool = False,
) -> Callable | None:  # fmt: skip
    """attention_layer of a group's stacks, which takes x, the norm's weight, `layer` and `rotary`; None if their heads
    are not joined, if they must be cast, or if the sizes do not fit.
    """
    stacks = {name: weights[name] for name in PROJECTIONS}
    joined = all(stack.ndim == 3 and stack.dtype == x.dtype for stack in stacks.values())
    if not joined or not fits(sizes, *x.shape, x.dtype, interpret):
        return None
    plan = make_plan(visibility, cache[0].shape[3], sharding.group_size(sizes.heads, sizes.kv_heads))
    return functools.partial(attention_layer, stacks=stacks, cache=cache, plan=plan, sizes=sizes, interpret=interpret)


def fits(sizes: Heads, batch: int, positions: int, embed: int, dtype, interpret: bool = False) -> bool:
    """Whether attention_layer takes these sizes, on this chip and over the mesh in force. False if heads or positions
    are no whole registers, if weights are split over their inputs, or heads otherwise than key/value heads.
    """
    mesh = sharding.mesh_in_force()
    heads, kv_heads = _per_device(sizes)
    if mesh is not None:
        grouped = heads * sizes.kv_heads == kv_heads * sizes.heads
        if mesh.shape["fsdp"] > 1 or not (grouped or sharding.kv_copies(sizes.heads, sizes.kv_heads) > 1):
            return False
        batch //= sharding.num_parts("batch", batch)
    d = sizes.head_dim
    outputs = [heads * d, kv_heads * d, kv_heads * d]
    into = projections.tiling(batch, positions, embed, outputs, d, dtype, interpret)
    out = projections.tiling(batch, positions, heads * d, [embed], projections.LANES, dtype, interpret)
    return into is not None and out is not None


@jax.named_scope(SCOPE)
def attention_layer(
    x: jax.Array, norm: jax.Array, stacks: Mapping[str, jax.Array], layer: jax.Array, cache: Sequence[jax.Array],
    rotary: QueryKeyRotary, plan: CachedPlan, sizes: Heads, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns the attention of RMSNorm(x) [batch, positions, embed], not yet added to x, and its keys and values.

    x [batch, positions, embed]; norm [embed]: the weight of its RMSNorm. stacks: PROJECTIONS, with joined heads
    (model/parameters.py). cache: cached keys and values, as cached_attention's. rotary: its angles are those of all
    positions. Keys and values [batch, kv_heads, positions, head_dim] are normalised and rotated. No gradient.
    """
    copies = sharding.kv_copies(sizes.heads, sizes.kv_heads)
    heads, _ = _per_device(sizes)
    mesh = sharding.mesh_in_force()
    summed = mesh is not None and heads < sizes.heads

    def local(x, norm, stacks, layer, cache, rotary, plan):
        into = [stacks[name] for name in PROJECTIONS[:3]]
        query, key, value = projections.project_heads(x, norm, into, layer, rotary, sizes.head_dim, interpret)
        query = query.reshape(*query.shape[:2], heads, sizes.head_dim)
        attended = attention_of_device(query, key, value, *cache, layer, plan, copies, interpret)
        attended = attended.reshape(*attended.shape[:2], -1)
        y = projections.project(attended, stacks["output"], layer, interpret)
        return jax.lax.psum(y, "tensor") if summed else y, key, value

    arguments = x, norm, dict(stacks), layer, tuple(cache), rotary, plan
    if mesh is None:
        return local(*arguments)
    cached = sharding.spec(CACHE_AXES, cache[0].shape, mesh)
    rows, whole = PartitionSpec(cached[1]), PartitionSpec()
    split = "tensor" if summed else None
    of_stacks = dict.fromkeys(PROJECTIONS[1:3], PartitionSpec(None, None, cached[2]))
    of_stacks |= {"query": PartitionSpec(None, None, split), "output": PartitionSpec(None, split)}
    of_rotary = jax.tree.map(lambda array: rows if array.ndim > 1 else whole, rotary)
    specs = rows, whole, of_stacks, whole, (cached, cached), of_rotary, rows
    own = PartitionSpec(cached[1], cached[2])
    return jax.shard_map(local, in_specs=specs, out_specs=(rows, own, own), check_vma=False)(*arguments)


def _per_device(sizes: Heads) -> tuple[int, int]:
    """(heads, kv_heads) of a device; where a key/value head is shared by several, each has all of them."""
    counts = dict(heads=sizes.heads, kv_heads=sizes.kv_heads)
    return tuple(count // sharding.num_parts(axis, count) for axis, count in counts.items())
