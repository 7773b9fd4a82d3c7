"""Attention in O(length) memory with plain XLA, for devices without the TPU kernel.

Flash attention (Dao et al., 2022): a tile of queries meets one chunk of keys at a time, the softmax is kept as a
running maximum and sum in float32, and the backward pass computes the scores again from the saved log-sum-exp. A tile
visits only the chunks between the first and the last key that one of its queries sees, among the noisy and among the
clean keys: other documents and later blocks cost nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.attention.visibility import Visibility

QUERY_TILE, KEY_CHUNK = 128, 128
_LOWEST = -1e30  # finite, so that a row without a key yet keeps a finite maximum


class _Tile(NamedTuple):
    """A tile of queries: its row of the batch, the runs of chunks it visits, and the interval bounds of its queries.

    row, noisy_first, noisy_count, clean_first, clean_count: [] int32; bounds [4, tile] int32, half-open, in keys:
    noisy start, noisy end, clean start, clean end. With a leading axis of all tiles of the batch outside the loops.
    """

    row: jax.Array
    noisy_first: jax.Array
    noisy_count: jax.Array
    clean_first: jax.Array
    clean_count: jax.Array
    bounds: jax.Array

    def chunk(self, i: jax.Array) -> jax.Array:
        """The i-th chunk to visit."""
        return jnp.where(i < self.noisy_count, self.noisy_first + i, self.clean_first + i - self.noisy_count)

    def mask(self, chunk: jax.Array) -> jax.Array:
        """bool [tile, KEY_CHUNK]"""
        key = (chunk * KEY_CHUNK + jnp.arange(KEY_CHUNK))[None]
        noisy_start, noisy_end, clean_start, clean_end = self.bounds[:, :, None]
        return ((key >= noisy_start) & (key < noisy_end)) | ((key >= clean_start) & (key < clean_end))


def blockwise_attention(query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility) -> jax.Array:
    """Equals dense_attention (same arguments and result) but never holds more than a tile of the scores.

    A query that sees no key gives 0. Under a mesh (`jax.set_mesh`) each shard works on its own rows and heads.
    """
    return sharding.over_heads(_attention)(query, key, value, visibility)


@jax.custom_vjp
def _attention(query, key, value, visibility):
    return _forward(query, key, value, visibility)[0]


def _forward(query, key, value, visibility):
    tiles = _tiles(visibility)
    query_tiles, key_rows, value_rows = _query_tiles(query, key.shape[2]), _key_rows(key), _key_rows(value)
    scale = query.shape[-1] ** -0.5

    def one_tile(tile: _Tile, q):
        """q [kv_heads, group * tile, head_dim] -> output, float32, and log-sum-exp [kv_heads, group * tile]"""

        def visit(i, state):
            output, highest, total = state
            chunk = tile.chunk(i)
            scores = _scores(q, key_rows, tile, chunk, scale)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            kept = jnp.exp(highest - new_highest)
            update = jnp.einsum(
                "krs,ksd->krd", weights.astype(value.dtype), _chunk(value_rows, tile, chunk),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            return output * kept[..., None] + update, new_highest, total * kept + weights.sum(axis=-1)

        start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], _LOWEST), jnp.zeros(q.shape[:-1])
        output, highest, total = jax.lax.fori_loop(0, tile.noisy_count + tile.clean_count, visit, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (output / total[..., None]).astype(query.dtype), highest + jnp.log(total)

    output_tiles, log_sums = jax.lax.map(lambda args: one_tile(*args), (tiles, query_tiles))
    output = _untile(output_tiles, query.shape)
    return output, (query, key, value, visibility, output, log_sums)


def _backward(residuals, cotangent):
    query, key, value, visibility, output, log_sums = residuals
    kv_heads, scale = key.shape[2], query.shape[-1] ** -0.5
    key_rows, value_rows = _key_rows(key), _key_rows(value)
    delta = jnp.einsum("bqhd,bqhd->bqh", output, cotangent, preferred_element_type=jnp.float32)

    def one_tile(gradients, inputs):
        tile, q, d_output, log_sum, delta = inputs

        def visit(i, state):
            d_query, (d_key, d_value) = state
            chunk = tile.chunk(i)
            keys, values = _chunk(key_rows, tile, chunk), _chunk(value_rows, tile, chunk)
            weights = jnp.exp(_scores(q, key_rows, tile, chunk, scale) - log_sum[..., None])
            dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_weights = dot("krd,ksd->krs", d_output, values)
            d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(key.dtype)
            d_value = _add(d_value, dot("krs,krd->ksd", weights.astype(d_output.dtype), d_output), tile, chunk)
            d_key = _add(d_key, dot("krs,krd->ksd", d_scores, q), tile, chunk)
            return d_query + dot("krs,ksd->krd", d_scores, keys), (d_key, d_value)

        start = jnp.zeros(q.shape, jnp.float32), gradients
        d_query, gradients = jax.lax.fori_loop(0, tile.noisy_count + tile.clean_count, visit, start)
        return gradients, d_query.astype(query.dtype)

    zeros = jnp.zeros(key_rows.shape, jnp.float32)
    inputs = (
        _tiles(visibility), _query_tiles(query, kv_heads), _query_tiles(cotangent, kv_heads), log_sums,
        _query_tiles(delta[..., None], kv_heads)[..., 0],
    )  # fmt: skip
    (d_key, d_value), d_query = jax.lax.scan(one_tile, (zeros, zeros), inputs)

    def unpad(x, like):
        return jnp.swapaxes(x, 1, 2)[:, : like.shape[1]].astype(like.dtype)

    return _untile(d_query, query.shape), unpad(d_key, key), unpad(d_value, value), None


_attention.defvjp(_forward, _backward)


def _scores(q, key_rows, tile: _Tile, chunk, scale) -> jax.Array:
    """Masked scores, float32 [kv_heads, group * tile, KEY_CHUNK]; minus infinity where a query does not see a key."""
    scores = jnp.einsum("krd,ksd->krs", q, _chunk(key_rows, tile, chunk), preferred_element_type=jnp.float32)
    mask = tile.mask(chunk)
    grouped = scores.reshape(scores.shape[0], -1, *mask.shape)
    return jnp.where(mask[None, None], grouped * scale, -jnp.inf).reshape(scores.shape)


def _chunk(rows: jax.Array, tile: _Tile, chunk: jax.Array) -> jax.Array:
    """[batch, kv_heads, keys, head_dim] -> [kv_heads, KEY_CHUNK, head_dim]"""
    size = (1, rows.shape[1], KEY_CHUNK, rows.shape[3])
    return jax.lax.dynamic_slice(rows, (tile.row, 0, chunk * KEY_CHUNK, 0), size)[0]


def _add(rows: jax.Array, update: jax.Array, tile: _Tile, chunk: jax.Array) -> jax.Array:
    """Adds to a chunk of [batch, kv_heads, keys, head_dim]."""
    update = _chunk(rows, tile, chunk) + update
    return jax.lax.dynamic_update_slice(rows, update[None], (tile.row, 0, chunk * KEY_CHUNK, 0))


def _tiles(visibility: Visibility) -> _Tile:
    """All tiles of the batch, row by row."""
    batch, queries = visibility.clean_start.shape
    num_noisy = visibility.num_noisy

    def split(bound):
        padded = jnp.pad(bound, ((0, 0), (0, -queries % QUERY_TILE)))  # padding sees nothing
        return padded.reshape(-1, QUERY_TILE)

    noisy_start, noisy_end = split(visibility.noisy_start), split(visibility.noisy_end)
    clean_start, clean_end = split(visibility.clean_start + num_noisy), split(visibility.clean_end + num_noisy)

    def run(start, end):
        seen = start < end
        first = jnp.min(jnp.where(seen, start, jnp.iinfo(jnp.int32).max), axis=1) // KEY_CHUNK
        last = -(-jnp.max(jnp.where(seen, end, 0), axis=1) // KEY_CHUNK)
        return jnp.where(seen.any(axis=1), first, 0), last

    (noisy_first, noisy_last), (clean_first, clean_last) = run(noisy_start, noisy_end), run(clean_start, clean_end)
    clean_first = jnp.maximum(clean_first, noisy_last)  # a chunk with the last noisy and first clean keys comes once
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), noisy_first.size // batch)
    bounds = jnp.stack([noisy_start, noisy_end, clean_start, clean_end], axis=1)
    counts = noisy_last - noisy_first, jnp.maximum(clean_last - clean_first, 0)
    return _Tile(row, noisy_first, counts[0], clean_first, counts[1], bounds)


def _query_tiles(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, queries, heads, head_dim] -> [tiles, kv_heads, group * QUERY_TILE, head_dim]"""
    batch, queries, heads, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -queries % QUERY_TILE), (0, 0), (0, 0)))
    x = x.reshape(-1, QUERY_TILE, kv_heads, heads // kv_heads, head_dim)
    return x.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], kv_heads, -1, head_dim)


def _untile(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of _query_tiles, to shape [batch, queries, heads, head_dim]."""
    batch, queries, heads, head_dim = shape
    x = x.reshape(x.shape[0], heads, QUERY_TILE, head_dim).transpose(0, 2, 1, 3)
    return x.reshape(batch, -1, heads, head_dim)[:, :queries]


def _key_rows(x: jax.Array) -> jax.Array:
    """[batch, keys, kv_heads, head_dim] -> [batch, kv_heads, keys, head_dim], whole chunks."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % KEY_CHUNK), (0, 0)))
