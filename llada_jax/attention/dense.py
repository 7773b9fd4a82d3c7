"""Attention with the whole score matrix in memory: the oracle that every other implementation must equal."""

import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import Visibility, dense_mask


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim) + mask) v, the softmax in float32.

    query [batch, queries, heads, head_dim]; key, value [batch, keys, kv_heads, head_dim], noisy keys first;
    heads is a multiple of kv_heads (grouped queries). Returns [batch, queries, heads, head_dim] in query's dtype.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    mask = dense_mask(visibility, key.shape[1])[:, None, None]
    scores = jnp.where(mask, scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)
