"""Attention in O(length) memory with plain XLA, for devices without the TPU kernel.

Flash attention (Dao et al., 2022) over the kernel's work list (attention/plan.py): a tile of queries meets one chunk of
keys at a time, the softmax is kept as a running maximum and sum in float32, and the backward pass computes the scores
again from the saved log-sum-exp. A tile visits only the chunks of its runs: other documents and later blocks cost
nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.attention import context, residuals
from llada_jax.attention.plan import CLEAN_OFFSET, COLUMNS, COUNT, NOISY_COUNT, NOISY_OFFSET, ROW, Plan, make_plan
from llada_jax.attention.tiles import Tiles
from llada_jax.attention.tiling import from_chunks, from_tiles, to_chunks, to_tiles
from llada_jax.attention.visibility import Visibility

TILES = Tiles(queries=128, forward=1, backward=1, chunk=128)
_LOWEST = -1e30  # finite, so that a row without a key yet keeps a finite maximum


class _Tile(NamedTuple):
    """A tile of queries: its columns of the plan [COLUMNS] int32, and the bounds of its queries [4, tile] int32."""

    run: jax.Array
    bounds: jax.Array

    def chunk(self, i: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
        """(number of the i-th chunk to visit among those of the batch, bool [tile, chunk]: who sees which key)."""
        noisy = i < self.run[NOISY_COUNT]
        chunk = i + jnp.where(noisy, self.run[NOISY_OFFSET], self.run[CLEAN_OFFSET])
        start, end = jnp.where(noisy, self.bounds[:2], self.bounds[2:])[:, :, None]
        key = (chunk * TILES.chunk + jnp.arange(TILES.chunk))[None]
        return self.run[ROW] * plan.chunks_per_row + chunk, (key >= start) & (key < end)


def blockwise_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, crosses: jax.Array | None = None
) -> jax.Array:
    """Equals dense_attention (same arguments and result) but never holds more than a tile of the scores.

    Returns 0 for a query that sees no key. Under a mesh (`jax.set_mesh`) each shard works on its own rows and heads,
    and with a context axis on its own queries: all operands are then ordered as context.to_ranks orders them, and
    crosses is context.blocks_cross of the visibility.
    """
    return sharding.over_heads(context.with_all_keys(_attention))(query, key, value, visibility, crosses)


@jax.custom_vjp
def _attention(query, key, value, visibility):
    return _forward(query, key, value, visibility)[0]


def _forward(query, key, value, visibility):
    plan = make_plan(visibility, key.shape[1], TILES)
    keys, values = to_chunks(key, plan), to_chunks(value, plan)
    scale = query.shape[-1] ** -0.5

    def one_tile(tile: _Tile, q):
        """q [kv_heads, rows, head_dim] -> output, in q's dtype, and log-sum-exp [kv_heads, rows]"""

        def visit(i, state):
            output, highest, total = state
            chunk, mask = tile.chunk(i, plan)
            scores = _scores(q, keys[:, chunk], mask, scale)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            decay = jnp.exp(highest - new_highest)
            update = jnp.einsum(
                "krs,ksd->krd", weights.astype(value.dtype), values[:, chunk], preferred_element_type=jnp.float32
            )
            return output * decay[..., None] + update, new_highest, total * decay + weights.sum(axis=-1)

        start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], _LOWEST), jnp.zeros(q.shape[:-1])
        output, highest, total = jax.lax.fori_loop(0, tile.run[COUNT], visit, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (output / total[..., None]).astype(query.dtype), highest + jnp.log(total)

    query_tiles = _tiles_first(query, key.shape[2], plan)
    output_tiles, log_sum = jax.lax.map(lambda args: one_tile(*args), (_tiles(plan), query_tiles))
    output = from_tiles(jnp.swapaxes(output_tiles, 0, 1), query.shape, plan)
    output, log_sum = residuals.named(output, log_sum)
    return output, (query, key, value, visibility, output, log_sum)


def _backward(saved, cotangent):
    query, key, value, visibility, output, log_sum = saved
    plan = make_plan(visibility, key.shape[1], TILES)
    keys, values = to_chunks(key, plan), to_chunks(value, plan)
    kv_heads, scale = key.shape[2], query.shape[-1] ** -0.5
    delta = jnp.einsum("bqhd,bqhd->bqh", output, cotangent, preferred_element_type=jnp.float32)

    def one_tile(gradients, inputs):
        tile, q, d_output, log_sum, delta = inputs

        def visit(i, state):
            d_query, (d_key, d_value) = state
            chunk, mask = tile.chunk(i, plan)
            weights = jnp.exp(_scores(q, keys[:, chunk], mask, scale) - log_sum[..., None])
            dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_weights = dot("krd,ksd->krs", d_output, values[:, chunk])
            d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(key.dtype)
            d_value = d_value.at[:, chunk].add(dot("krs,krd->ksd", weights.astype(d_output.dtype), d_output))
            d_key = d_key.at[:, chunk].add(dot("krs,krd->ksd", d_scores, q))
            return d_query + dot("krs,ksd->krd", d_scores, keys[:, chunk]), (d_key, d_value)

        start = jnp.zeros(q.shape, jnp.float32), gradients
        d_query, gradients = jax.lax.fori_loop(0, tile.run[COUNT], visit, start)
        return gradients, d_query.astype(query.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    inputs = _tiles(plan), *(_tiles_first(x, kv_heads, plan) for x in (query, cotangent)), log_sum
    inputs += (_tiles_first(delta, kv_heads, plan),)
    (d_key, d_value), d_query = jax.lax.scan(one_tile, (zeros, zeros), inputs)
    d_query = from_tiles(jnp.swapaxes(d_query, 0, 1), query.shape, plan)
    d_key, d_value = (from_chunks(x, key.shape, plan).astype(key.dtype) for x in (d_key, d_value))
    return d_query, d_key, d_value, None


_attention.defvjp(_forward, _backward)


def _scores(q, keys, mask, scale) -> jax.Array:
    """Masked scores, float32 [kv_heads, rows, chunk]; minus infinity where a query does not see a key."""
    scores = jnp.einsum("krd,ksd->krs", q, keys, preferred_element_type=jnp.float32)
    grouped = scores.reshape(scores.shape[0], -1, *mask.shape)
    return jnp.where(mask[None, None], grouped * scale, -jnp.inf).reshape(scores.shape)


def _tiles(plan: Plan) -> _Tile:
    """All tiles of the batch, row by row."""
    return _Tile(plan.runs.reshape(-1, COLUMNS)[:-1], plan.bounds)


def _tiles_first(x: jax.Array, kv_heads: int, plan: Plan) -> jax.Array:
    """[batch, queries, heads, ...] -> [query tiles, kv_heads, rows, ...]"""
    return jnp.swapaxes(to_tiles(x, kv_heads, plan), 0, 1)
