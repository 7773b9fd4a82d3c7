"""The TPU attention: one Pallas kernel each way for every mask of the project.

Masks are key intervals (attention/visibility.py), cut into a work list once per step (attention/plan.py); the kernels
(kernel_forward.py, kernel_backward.py) walk that list. Memory is O(length): no array of queries x keys exists.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from llada_jax import sharding
from llada_jax.attention import context, kernel_backward, kernel_forward, residuals
from llada_jax.attention.plan import Plan, make_plan
from llada_jax.attention.tiles import Tiles, device_kind, tiles_for
from llada_jax.attention.tiling import from_chunks, from_parts, from_tiles, to_chunks, to_parts, to_tiles
from llada_jax.attention.visibility import Visibility

# Interpret mode takes any head_dim and is slow by the copy: few, small tiles.
INTERPRET_TILES = Tiles(queries=32, chunk=32, forward=2, backward=2)


def kernel_plan(visibility: Visibility, num_keys: int, group: int, head_dim: int, interpret: bool = False) -> Plan:
    """What kernel_attention needs to know of a mask: made once per pass, outside the layers.

    visibility [batch, queries] over num_keys keys; group: query heads of each key/value head. Under a mesh
    (`jax.set_mesh`) each shard of the tokens plans its own queries. Raises InputError when the device is not a TPU that
    attention/tiles.py knows; interpret=True plans for kernel_attention(..., interpret=True), on any device.
    """
    queries = visibility.clean_start.shape[1]
    tiles, parts = INTERPRET_TILES, 1
    if not interpret:
        tiles = tiles_for(device_kind(), head_dim, group, queries // context.ranks())
        parts = kernel_backward.key_parts(visibility.num_noisy, num_keys, tiles, group, head_dim)
    local = functools.partial(make_plan, num_keys=num_keys, tiles=tiles, parts=parts)
    if (mesh := sharding.mesh_in_force()) is None:
        return local(visibility)
    shape = visibility.clean_start.shape
    specs = dict(
        in_specs=sharding.spec(("batch", "length"), shape, mesh), out_specs=sharding.tokens_joined(shape, mesh)
    )
    return jax.shard_map(local, **specs, check_vma=False)(visibility)


def kernel_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, plan: Plan, interpret: bool = False,
    crosses: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Equals dense_attention (same query, key, value and result) for the visibility that the plan was made of.

    A query that sees no key gives zeros. interpret=True runs the kernel on any device, slowly, for tests. With a
    context axis operands and crosses are as in blockwise_attention.
    """
    interpret = pltpu.InterpretParams() if interpret else False
    local = context.with_all_keys(lambda *operands: _attention(*operands, interpret))
    return sharding.over_heads(local, joined=True)(query, key, value, plan, crosses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, plan, interpret):
    return _forward(query, key, value, plan, interpret)[0]


def _forward(query, key, value, plan, interpret):
    operands = _operands(query, key, value, plan)
    output_tiles, log_sum = kernel_forward.forward(*operands, plan, interpret)
    output, log_sum = residuals.named(from_tiles(output_tiles, query.shape, plan), log_sum)
    return output, (query, key, value, plan, output, log_sum)


def _backward(interpret, saved, cotangent):
    query, key, value, plan, output, log_sum = saved
    projection = jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    kv_heads = key.shape[2]
    statistics = jnp.concatenate([log_sum, to_tiles(projection, kv_heads, plan)[:, :, None]], axis=2)
    query_tiles, *keys_values = _operands(query, key, value, plan)
    cotangent_tiles = to_tiles(cotangent, kv_heads, plan)

    def gradients(plan, key, value, d_query_dtype):
        operands = query_tiles, key, value, cotangent_tiles, statistics
        return kernel_backward.backward(*operands, plan, d_query_dtype, interpret)

    if plan.parts:
        plans = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plan.parts)

        def visit(sum_d_query, part):
            d_query, *d_keys_values = gradients(*part, jnp.float32)
            return sum_d_query + d_query, d_keys_values

        start = jnp.zeros(query_tiles.shape, jnp.float32)
        parts = plans, *(to_parts(x, plan) for x in keys_values)
        d_query, d_keys_values = jax.lax.scan(visit, start, parts)
        d_query, d_keys_values = d_query.astype(query.dtype), [from_parts(x, plan) for x in d_keys_values]
    else:
        d_query, *d_keys_values = gradients(plan, *keys_values, query.dtype)
    d_query = from_tiles(d_query, query.shape, plan)
    d_key, d_value = (from_chunks(gradient, key.shape, plan) for gradient in d_keys_values)
    # The kernel saw scores in units of log 2, and a query that held the scale.
    d_query = d_query * query.shape[-1] ** -0.5
    return d_query, (d_key * math.log(2)).astype(key.dtype), d_value.astype(value.dtype), None


def _operands(query, key, value, plan):
    scale = query.shape[-1] ** -0.5 * math.log2(math.e)
    query_tiles = to_tiles((query * scale).astype(query.dtype), key.shape[2], plan)
    return query_tiles, to_chunks(key, plan), to_chunks(value, plan)


_attention.defvjp(_forward, _backward)
