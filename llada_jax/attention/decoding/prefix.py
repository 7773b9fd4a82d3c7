"""Attention of a chunk of a prompt on TPUs: many queries of a row, over their own keys and the cached keys before them.

The kernel of training runs it. It takes keys in chunks of one array, [kv_heads, chunks, chunk, head_dim], and so lies a
layer of a row's cache: as much of it as is filled is copied behind the own keys, which costs little beside the
arithmetic of so many queries.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention import kernel_forward
from llada_jax.attention.decoding.cache_write import launch_copies
from llada_jax.attention.decoding.cached import CACHE_AXES, SCOPE
from llada_jax.attention.kernel import kernel_plan, sides
from llada_jax.attention.kernel_operands import tiles_of_rows
from llada_jax.attention.plan import Plan
from llada_jax.attention.rotary import QueryKeyRotary
from llada_jax.attention.visibility import Visibility

MOST_OF_A_WINDOW = 1024  # queries of a group of heads: the scores of more would not fit fast memory in cached_kernel.py
JOIN = "prefix_keys"


@flax.struct.dataclass
class PrefixPlan:
    """The mask of a chunk: of kernel_plan, over own and cached keys. filled [rows] int32: cached positions in use."""

    plan: Plan
    filled: jax.Array


def takes(queries: int, rows: int, group: int) -> bool:
    """Whether a pass over so many queries of each row runs prefix_attention: only with one row on each device, as
    prefill.prefill_chunk has it. rows: of all devices; group: as in make_plan.
    """
    return rows == sharding.num_parts("batch", rows) and queries * group > MOST_OF_A_WINDOW


def make_plan(visibility: Visibility, length: int, group: int, head_dim: int, interpret: bool = False) -> PrefixPlan:
    """length: positions of the cache; others as in kernel.kernel_plan."""
    plan = kernel_plan(visibility, visibility.num_noisy + length, group, head_dim, interpret)
    return PrefixPlan(plan, visibility.clean_end.max(axis=1))


@jax.named_scope(SCOPE)
def prefix_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, cached_key: jax.Array, cached_value: jax.Array,
    layer: jax.Array | int, plan: PrefixPlan, rotary: QueryKeyRotary = QueryKeyRotary(), interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Equals cached_attention of `rotary.apply(query, key)`; operands are as there, of one row on each device. The last
    axis of the cache may be longer than head_dim. Raises ValueError if a device has several rows.
    """
    if len(query) != sharding.num_parts("batch", len(query)):
        raise ValueError(f"{len(query)} rows, expected one on each device")
    if rotary.key is not None:  # those of the cache have theirs
        key, rotary = rotary.key(key), rotary._replace(key=None)
    copies = sharding.kv_copies(query.shape[2], key.shape[2])
    local = functools.partial(_attention_of_device, copies=copies, interpret=interpret)
    arrays = query, rotary.query, jnp.asarray(layer, jnp.int32), plan, key, value, cached_key, cached_value
    if (mesh := sharding.mesh_in_force()) is None:
        return local(*arrays)
    cache = sharding.spec(CACHE_AXES, cached_key.shape, mesh)
    rows, split = PartitionSpec(cache[1]), "tensor" if copies > 1 else cache[2]
    queries, own = PartitionSpec(cache[1], None, split), PartitionSpec(cache[1], None, cache[2])
    of_rotary = jax.tree.map(lambda x: rows if x.ndim > 1 else PartitionSpec(), rotary.query)
    specs = queries, of_rotary, PartitionSpec(), rows, own, own, cache, cache
    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(*arrays)


def _attention_of_device(
    query, rotary, layer, plan: PrefixPlan, key, value, cached_key, cached_value, copies, interpret
):
    interpret = pltpu.InterpretParams() if interpret else False
    streams = (key, cached_key, "attention_key"), (value, cached_value, "attention_value")
    if copies > 1:  # each rank has all key/value heads, and uses one
        head = lax.axis_index("tensor") // copies
        streams = [(*(lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in pair), name) for *pair, name in streams]
    of_queries, _ = sides(plan.plan)
    scale = query.shape[3] ** -0.5 * math.log2(math.e)
    tiles = of_queries.tiles(query, streams[0][0].shape[2], "attention_query", rotary, scale, interpret)
    chunks = [_chunks(own, cached, layer, plan, name, interpret) for own, cached, name in streams]
    output, _ = kernel_forward.forward(tiles, *chunks, plan.plan, interpret)
    return of_queries.rows(output, query, "attention_output", interpret=interpret)[0]


def _chunks(own, cached, layer, plan: PrefixPlan, name, interpret):
    """[kv_heads, chunks, chunk, head_dim]: own [1, positions, kv_heads, head_dim], then cached [layers, 1, kv_heads,
    positions, head_dim or more], each up to whole chunks. What no query sees may be anything.
    """
    chunk, (_, _, kv_heads, head_dim) = plan.plan.tiles.chunk, own.shape
    own = jnp.pad(own, ((0, 0), (0, -own.shape[1] % chunk), (0, 0), (0, 0)))
    own = tiles_of_rows(own, kv_heads, chunk, name, interpret=interpret).reshape(kv_heads, -1, head_dim)
    if cached.shape[3] % chunk == 0 and cached.shape[4] == head_dim and cached.dtype == own.dtype:
        joined = _join(own, cached, layer, plan.filled, chunk, interpret)
    else:
        of_layer = lax.dynamic_index_in_dim(cached, layer, keepdims=False)[0, ..., :head_dim].astype(own.dtype)
        behind = jnp.pad(of_layer, ((0, 0), (own.shape[1], -of_layer.shape[1] % chunk), (0, 0)))
        joined = lax.dynamic_update_slice(behind, own, (0, 0, 0))
    return joined.reshape(kv_heads, -1, chunk, head_dim)


def _join(own, cached, layer, filled, chunk: int, interpret):
    """own [kv_heads, positions, head_dim], then the chunks of the layer's cache that hold the first `filled` ones."""

    def kernel(layer, filled, own, cached, joined, done):
        def copy(i):
            part, place = (pl.ds(pl.multiple_of(start + i * chunk, chunk), chunk) for start in (0, own.shape[1]))
            return pltpu.make_async_copy(cached.at[layer[0], 0, :, part], joined.at[:, place], done.at[0])

        def of_chunks(function):
            lax.fori_loop(0, (filled[0] + chunk - 1) // chunk, lambda i, _: function(copy(i)), None)

        first = pltpu.make_async_copy(own, joined.at[:, pl.ds(0, own.shape[1])], done.at[1])
        first.start()
        of_chunks(lambda copy: copy.start())
        first.wait()
        of_chunks(lambda copy: copy.wait())

    shape = own.shape[0], own.shape[1] + cached.shape[3], own.shape[2]
    return launch_copies(kernel, JOIN, (layer.reshape(1), filled), (own, cached), shape, 2, bool(interpret))
