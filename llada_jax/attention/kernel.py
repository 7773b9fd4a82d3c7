"""The TPU attention: one Pallas kernel each way for every mask of the project.

Masks are key intervals (attention/visibility.py), cut into a work list once per step (attention/plan.py); the kernels
(kernel_forward.py, kernel_backward.py) walk that list. Memory is O(length): no array of queries x keys exists.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention import kernel_backward, kernel_forward
from llada_jax.attention.plan import Plan, make_plan
from llada_jax.attention.tiles import Tiles, device_kind, tiles_for
from llada_jax.attention.visibility import Visibility

# Interpret mode takes any head_dim and is slow by the copy: few, small tiles.
INTERPRET_TILES = Tiles(queries=32, chunk=32, forward=2, backward=2)


def kernel_plan(visibility: Visibility, num_keys: int, group: int, head_dim: int, interpret: bool = False) -> Plan:
    """What kernel_attention needs to know of a mask: made once per pass, outside the layers.

    visibility [batch, queries] over num_keys keys; group: query heads of each key/value head. Under a mesh
    (`jax.set_mesh`) each shard of the batch plans its own rows. Raises InputError when the device is not a TPU that
    attention/tiles.py knows; interpret=True plans for kernel_attention(..., interpret=True), on any device.
    """
    queries = visibility.clean_start.shape[1]
    tiles = INTERPRET_TILES if interpret else tiles_for(device_kind(), head_dim, group, queries)
    local = functools.partial(make_plan, num_keys=num_keys, tiles=tiles)
    if (mesh := sharding.mesh_in_force()) is None:
        return local(visibility)
    rows = sharding.spec(("batch", None), visibility.clean_start.shape, mesh)
    # Every leaf of a plan is a concatenation over the shards of the batch.
    return jax.shard_map(local, in_specs=rows, out_specs=PartitionSpec(rows[0]), check_vma=False)(visibility)


def kernel_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, plan: Plan, interpret: bool = False
) -> jax.Array:
    """Equals dense_attention (same query, key, value and result) for the visibility that the plan was made of.

    A query that sees no key gives zeros. interpret=True runs the kernel on any device, slowly, for tests.
    """
    interpret = pltpu.InterpretParams() if interpret else False
    return sharding.over_heads(lambda *operands: _attention(*operands, interpret))(query, key, value, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, plan, interpret):
    return _forward(query, key, value, plan, interpret)[0]


def _forward(query, key, value, plan, interpret):
    operands = _operands(query, key, value, plan)
    output_tiles, log_sum = kernel_forward.forward(*operands, plan, interpret)
    output = from_tiles(output_tiles, query.shape, plan)
    return output, (query, key, value, plan, output, log_sum)


def _backward(interpret, residuals, cotangent):
    query, key, value, plan, output, log_sum = residuals
    projection = jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    kv_heads = key.shape[2]
    statistics = jnp.concatenate([log_sum, to_tiles(projection, kv_heads, plan)[:, :, None]], axis=2)
    operands = _operands(query, key, value, plan)
    gradients = kernel_backward.backward(*operands, to_tiles(cotangent, kv_heads, plan), statistics, plan, interpret)
    d_query = from_tiles(gradients[0], query.shape, plan)
    d_key, d_value = (from_chunks(gradient, key.shape, plan) for gradient in gradients[1:])
    # The kernel saw scores in units of log 2, and a query that held the scale.
    d_query = d_query * query.shape[-1] ** -0.5
    return d_query, (d_key * math.log(2)).astype(key.dtype), d_value.astype(value.dtype), None


def _operands(query, key, value, plan):
    scale = query.shape[-1] ** -0.5 * math.log2(math.e)
    query_tiles = to_tiles((query * scale).astype(query.dtype), key.shape[2], plan)
    return query_tiles, to_chunks(key, plan), to_chunks(value, plan)


_attention.defvjp(_forward, _backward)


def to_tiles(x: jax.Array, kv_heads: int, plan: Plan) -> jax.Array:
    """[batch, queries, heads, ...] -> [kv_heads, query tiles, rows, ...]; a tile's rows are its heads x positions."""
    batch, queries, heads = x.shape[:3]
    tile = plan.tiles.queries
    x = jnp.pad(x, ((0, 0), (0, -queries % tile)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, -1, tile, kv_heads, heads // kv_heads, *x.shape[3:])
    x = x.transpose(3, 0, 1, 4, 2, *range(5, x.ndim))
    return x.reshape(kv_heads, batch * plan.tiles_per_row, -1, *x.shape[5:])


def from_tiles(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
    """Inverse of to_tiles: [kv_heads, query tiles, rows, head_dim] -> shape = [batch, queries, heads, head_dim]."""
    batch, queries, heads, head_dim = shape
    x = x.reshape(x.shape[0], batch, plan.tiles_per_row, -1, plan.tiles.queries, head_dim)
    return x.transpose(1, 2, 4, 0, 3, 5).reshape(batch, -1, heads, head_dim)[:, :queries]


def to_chunks(x: jax.Array, plan: Plan) -> jax.Array:
    """[batch, keys, kv_heads, head_dim] -> [kv_heads, chunks, chunk, head_dim], each half padded to whole chunks."""
    chunk = plan.tiles.chunk
    halves = (x[:, : plan.num_noisy], x[:, plan.num_noisy :])
    if plan.num_noisy % chunk or x.shape[1] % chunk:
        halves = [jnp.pad(half, ((0, 0), (0, -half.shape[1] % chunk), (0, 0), (0, 0))) for half in halves]
        x = jnp.concatenate(halves, axis=1)
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, chunk, x.shape[3])


def from_chunks(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
    """Inverse of to_chunks: [kv_heads, chunks, chunk, head_dim] -> shape = [batch, keys, kv_heads, head_dim]."""
    batch, keys, kv_heads, head_dim = shape
    x = x.reshape(kv_heads, batch, -1, head_dim).transpose(1, 2, 0, 3)
    if x.shape[1] == keys:
        return x
    padded = plan.noisy_chunks * plan.tiles.chunk
    clean = x[:, padded : padded + keys - plan.num_noisy]
    return jnp.concatenate([x[:, : plan.num_noisy], clean], axis=1)
