"""Attention of decoding: a few queries per row, their own keys, and a long cache of clean keys that is read in place.

The cache is read in chunks, up to the longest prefix that any row of the batch may see. So a step costs as much as its
prefix, not as the whole cache, and cached and own keys are never copied into one array.
"""

import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import Visibility

SCOPE = "cached_attention"  # of all of it, and of writing the cache
CACHE_AXES = ("layers", "batch", "kv_heads", None, None)  # of cached keys and values: positions, then head_dim
LEAST_CHUNK, MOST_CHUNK = 128, 1024
WHOLE_CHUNKS, OTHER_CHUNKS = "whole_chunks", "other_chunks"  # scopes of the two loops over the cache
_LOWEST = -1e30  # finite, so that a row that sees nothing yet keeps a finite maximum


@jax.named_scope(SCOPE)
def cached_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, cached_key: jax.Array, cached_value: jax.Array,
    layer: jax.Array | int, visibility: Visibility,
) -> jax.Array:  # fmt: skip
    """dense_attention over [own keys, cached keys]: the noisy intervals are in own keys, the clean ones in the cache.

    query [batch, queries, heads, head_dim]; key, value [batch, own, kv_heads, head_dim]; cached_key, cached_value
    [layers, batch, kv_heads, cached, head_dim], of which `layer` is read in place. Returns query's shape and dtype;
    zeros for a query that sees no key.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # [batch, kv_heads, group * queries, head_dim]: one matrix per key head, made once; CPUs multiply it faster.
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, -1, head_dim)
    shape = (batch, kv_heads, heads // kv_heads, queries)

    def visit(state, keys, values, visible=None):
        """Folds keys [batch, kv_heads, keys, ...] into the running (output, maximum, sum), float32; visible [batch, q,
        keys], None: all are.
        """
        output, highest, total = state
        scores = jnp.einsum("bkrd,bksd->bkrs", grouped, keys, preferred_element_type=jnp.float32).reshape(*shape, -1)
        if visible is not None:
            scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        decay = jnp.exp(highest - new_highest)
        update = jnp.einsum(
            "bkgqs,bksd->bkgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return output * decay[..., None] + update, new_highest, total * decay + weights.sum(axis=-1)

    length = cached_key.shape[3]
    chunk = chunk_of(length)

    def part(start):
        shape = (1, batch, kv_heads, chunk, head_dim)
        return [jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), shape)[0] for x in (cached_key, cached_value)]

    def visit_cache(i, state):
        start = jnp.minimum(i * chunk, length - chunk)  # the last chunk may overlap the one before
        position = start + jnp.arange(chunk)
        visible = _inside(jnp.where(position >= i * chunk, position, -1), visibility.clean_start, visibility.clean_end)
        return visit(state, *part(start), visible)

    state = jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, _LOWEST), jnp.zeros(shape)
    own = (jnp.moveaxis(x, 2, 1) for x in (key, value))
    state = visit(state, *own, _inside(jnp.arange(key.shape[1]), visibility.noisy_start, visibility.noisy_end))
    seen = jnp.max(jnp.where(visibility.clean_start < visibility.clean_end, visibility.clean_end, 0))
    # Chunks that all queries see whole need no mask; those of a single request are such.
    whole = jnp.where((visibility.clean_start == 0).all(), visibility.clean_end.min() // chunk, 0)
    with jax.named_scope(WHOLE_CHUNKS):
        state = jax.lax.fori_loop(0, whole, lambda i, state: visit(state, *part(i * chunk)), state)
    with jax.named_scope(OTHER_CHUNKS):
        output, _, total = jax.lax.fori_loop(whole, -(-seen // chunk), visit_cache, state)
    output = output / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(output, 3, 1).reshape(query.shape).astype(query.dtype)


def chunk_of(length: int) -> int:
    """Returns how many positions of a cache of `length` are read at a time."""
    return min(length, MOST_CHUNK, max(LEAST_CHUNK, length // 8))


def _inside(position: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """bool [batch, queries, positions]; a negative position is inside nothing."""
    position = position[None, None]
    return (position >= start[..., None]) & (position < end[..., None])
