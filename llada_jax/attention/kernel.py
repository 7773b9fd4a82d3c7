"""The TPU attention: one forward and one backward Pallas kernel for every mask of the project.

Masks are key intervals (attention/visibility.py), cut into a work list once per step (attention/plan.py); the kernels
(kernel_forward.py, kernel_backward.py) walk that list. Memory is O(length): no array of queries x keys exists.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import layout
from jax.experimental.pallas import tpu as pltpu

from llada_jax import sharding
from llada_jax.attention import context, kernel_backward, kernel_forward, residuals
from llada_jax.attention.kernel_operands import cotangent_tiles, rows_of_tiles, steps, tiles_of_rows
from llada_jax.attention.plan import Plan, make_plan
from llada_jax.attention.rotary import QueryKeyRotary
from llada_jax.attention.tiles import Tiles, device_kind, tiles_for
from llada_jax.attention.tiling import cut_keys, from_parts, pad_keys, pad_queries, to_parts
from llada_jax.attention.visibility import Visibility

# Interpret mode takes any head_dim, and its time is that of its copies: few, small tiles.
INTERPRET_TILES = Tiles(queries=32, chunk=32, forward=2, backward=2)


def kernel_plan(visibility: Visibility, num_keys: int, group: int, head_dim: int, interpret: bool = False) -> Plan:
    """Returns the plan of a mask for kernel_attention. Made once per pass, outside the layers.

    visibility [batch, queries] over num_keys keys; group: query heads per key/value head. Under a mesh (`jax.set_mesh`)
    each shard of the tokens plans its own queries. interpret=True plans for kernel_attention(..., interpret=True), on
    any device; otherwise raises InputError if the device is not a TPU in the table of attention/tiles.py.
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
    crosses: jax.Array | None = None, rotary: QueryKeyRotary = QueryKeyRotary(),
) -> jax.Array:  # fmt: skip
    """Equals dense_attention of `rotary.apply(query, key)`, with the visibility that the plan was made from.

    query, key, value and the result are as there; zeros for a query that sees no key. interpret=True runs the kernels
    on any device, slowly, for tests. With a context axis operands and crosses are as in blockwise_attention.
    """
    if crosses is not None and rotary.key is not None:  # keys go to ranks that do not have their angles
        key, rotary = rotary.key(key), rotary._replace(key=None)
    interpret = pltpu.InterpretParams() if interpret else False
    local = context.with_all_keys(lambda *operands: _attention(*operands, interpret))
    return sharding.over_heads(local, joined=True)(query, key, value, plan, crosses, rotary)


def operand_steps(queries: int, heads: int, keys: int, kv_heads: int, head_dim: int, tiles: Tiles) -> dict[str, int]:
    """Returns {kernel name: grid steps} of the kernels around the attention of one bfloat16 row.

    queries, keys: numbers of positions, in whole tiles and chunks.
    """

    def count(length, heads, tile, itemsize=2):
        return steps((1, length, heads, head_dim), kv_heads, tile, itemsize)

    names = "attention_query_tiles", "attention_query_rows", "attention_output_rows"
    counts = dict.fromkeys(names, count(queries, heads, tiles.queries))
    counts["attention_cotangent_tiles"] = count(queries, heads, tiles.queries, 4)
    names = (f"attention_{name}_{form}" for name in ("key", "value") for form in ("tiles", "rows"))
    return counts | dict.fromkeys(names, count(keys, kv_heads, tiles.chunk))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key, value, plan, rotary, interpret):
    return _forward(query, key, value, plan, rotary, interpret)[0]


def _forward(query, key, value, plan, rotary, interpret):
    operands = _operands(query, key, value, plan, rotary, interpret)
    output_tiles, log_sum = kernel_forward.forward(*operands, plan, interpret)
    queries, _ = sides(plan)
    output, _ = queries.rows(output_tiles, query, "attention_output", interpret=interpret)
    output, log_sum = residuals.named(output.reshape(*output.shape[:2], -1), log_sum)
    # XLA would transpose it for the gradient of the next weights, and back again for our kernels.
    output = layout.with_layout_constraint(output, layout.Layout((0, 1, 2))).reshape(query.shape)
    return output, (query, key, value, plan, rotary, output, log_sum)


def _backward(interpret, saved, cotangent):
    query, key, value, plan, rotary, output, log_sum = saved
    query_tiles, *keys_values = _operands(query, key, value, plan, rotary, interpret)
    queries, keys = sides(plan)
    padded = queries.pad(output), queries.pad(cotangent)
    cotangent_and_sums = cotangent_tiles(*padded, log_sum, queries.tile, interpret)

    def gradients(plan, key, value, d_query_dtype):
        return kernel_backward.backward(query_tiles, key, value, *cotangent_and_sums, plan, d_query_dtype, interpret)

    if plan.parts:
        # One after the other in the program, not in a loop, whose operands and results would be copied once more.
        parts = zip(plan.parts, *(to_parts(x, plan) for x in keys_values), strict=True)
        d_queries, *d_keys_values = zip(*(gradients(*part, jnp.float32) for part in parts), strict=True)
        d_query = functools.reduce(jnp.add, d_queries).astype(query.dtype)
        d_keys_values = [from_parts(x, plan) for x in d_keys_values]
    else:
        d_query, *d_keys_values = gradients(plan, *keys_values, query.dtype)
    # The kernel's scores are in units of log 2, and its query includes the scale.
    scale, (d_key, d_value) = query.shape[-1] ** -0.5, d_keys_values
    d_query, d_query_rotary = queries.rows(d_query, query, "attention_query", rotary.query, scale, interpret)
    d_key, d_key_rotary = keys.rows(d_key, key, "attention_key", rotary.key, math.log(2), interpret)
    d_value, _ = keys.rows(d_value, value, "attention_value", interpret=interpret)
    return d_query, d_key, d_value, None, QueryKeyRotary(d_query_rotary, d_key_rotary)


def _operands(query, key, value, plan, rotary, interpret):
    """In tiles and chunks; the query times log2(e) / sqrt(head_dim)."""
    queries, keys = sides(plan)
    scale, kv_heads = query.shape[-1] ** -0.5 * math.log2(math.e), key.shape[2]
    return (
        queries.tiles(query, kv_heads, "attention_query", rotary.query, scale, interpret),
        keys.tiles(key, kv_heads, "attention_key", rotary.key, interpret=interpret),
        keys.tiles(value, kv_heads, "attention_value", interpret=interpret),
    )


class _Side(NamedTuple):
    """Queries, or keys and values: positions of a tile, what makes whole tiles of rows, and its inverse."""

    tile: int
    pad: Callable[[jax.Array], jax.Array]
    cut: Callable[[jax.Array], jax.Array]

    def tiles(self, x, kv_heads, name, rotary=None, scale=1.0, interpret=False):
        """As kernel_operands.tiles_of_rows, of rows of any length."""
        return tiles_of_rows(self.pad(x), kv_heads, self.tile, name, self._padded(rotary), scale, interpret)

    def rows(self, tiles, x, name, rotary=None, scale=1.0, interpret=False):
        """(gradient of x, gradient of rotary) as kernel_operands.rows_of_tiles, of rows of any length."""
        rows, d_weight = rows_of_tiles(tiles, self.pad(x), self.tile, name, self._padded(rotary), scale, interpret)
        if rotary is not None:  # whose angles have no gradient
            d_weight = d_weight if d_weight is None else d_weight.astype(rotary.weight.dtype)
            rotary = rotary.replace(weight=d_weight, cos=None, sin=None)
        return self.cut(rows), rotary

    def _padded(self, rotary):
        return rotary and rotary.replace(cos=self.pad(rotary.cos), sin=self.pad(rotary.sin))


def sides(plan: Plan) -> tuple[_Side, _Side]:
    """Of queries, and of keys."""
    queries = _Side(plan.tiles.queries, lambda x: pad_queries(x, plan), lambda x: x[:, : plan.num_queries])
    return queries, _Side(plan.tiles.chunk, lambda x: pad_keys(x, plan), lambda x: cut_keys(x, plan))


_attention.defvjp(_forward, _backward)
