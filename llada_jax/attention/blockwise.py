"""Attention in O(length) memory with plain XLA: one tile of queries at a time, recomputed in the backward pass."""

import jax
import jax.numpy as jnp

from llada_jax.attention.dense import dense_attention
from llada_jax.attention.visibility import Visibility

QUERY_TILE = 128


def blockwise_attention(query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility) -> jax.Array:
    """Equals dense_attention (same arguments and result) but never holds more than a tile of rows of the scores."""
    batch, queries, heads, head_dim = query.shape
    tile = min(QUERY_TILE, queries)
    padding = -queries % tile

    def split(x, fill=0):
        """[batch, queries, ...] -> [tiles, batch, tile, ...]"""
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, tile, *x.shape[2:]), 1, 0)

    # Padding queries see keys 0 .. 1, so that their softmax is finite; their output is cut off.
    starts = split(visibility.clean_start), split(visibility.noisy_start)
    ends = split(visibility.clean_end, 1), split(visibility.noisy_end, 1)

    @jax.checkpoint
    def one_tile(carry, tile_input):
        query, (clean_start, noisy_start), (clean_end, noisy_end) = tile_input
        part = Visibility(clean_start, clean_end, noisy_start, noisy_end, visibility.num_noisy)
        return carry, dense_attention(query, key, value, part)

    _, tiles = jax.lax.scan(one_tile, None, (split(query), starts, ends))
    joined = jnp.moveaxis(tiles, 0, 1).reshape(batch, queries + padding, heads, head_dim)
    return joined[:, :queries]
