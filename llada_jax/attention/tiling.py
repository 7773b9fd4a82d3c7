"""Cuts the operands of attention into the tiles and chunks of a plan, and joins them again."""

import jax
import jax.numpy as jnp

from llada_jax.attention.plan import Plan


def to_tiles(x: jax.Array, kv_heads: int, plan: Plan) -> jax.Array:
    """[batch, queries, heads, ...] -> [kv_heads, query tiles, rows, ...]; a tile's rows are its heads x positions."""
    batch, _, heads = x.shape[:3]
    x = pad_queries(x, plan).reshape(batch, -1, plan.tiles.queries, kv_heads, heads // kv_heads, *x.shape[3:])
    x = x.transpose(3, 0, 1, 4, 2, *range(5, x.ndim))
    return x.reshape(kv_heads, batch * plan.tiles_per_row, -1, *x.shape[5:])


def from_tiles(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
    """Inverse of to_tiles: [kv_heads, query tiles, rows, head_dim] -> shape = [batch, queries, heads, head_dim]."""
    batch, queries, heads, head_dim = shape
    x = x.reshape(x.shape[0], batch, plan.tiles_per_row, -1, plan.tiles.queries, head_dim)
    return x.transpose(1, 2, 4, 0, 3, 5).reshape(batch, -1, heads, head_dim)[:, :queries]


def to_chunks(x: jax.Array, plan: Plan) -> jax.Array:
    """[batch, keys, kv_heads, head_dim] -> [kv_heads, chunks, chunk, head_dim], each half padded to whole chunks."""
    x = pad_keys(x, plan)
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, plan.tiles.chunk, x.shape[3])


def from_chunks(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
    """Inverse of to_chunks: [kv_heads, chunks, chunk, head_dim] -> shape = [batch, keys, kv_heads, head_dim]."""
    batch, _, kv_heads, head_dim = shape
    return cut_keys(x.reshape(kv_heads, batch, -1, head_dim).transpose(1, 2, 0, 3), plan)


def pad_queries(x: jax.Array, plan: Plan) -> jax.Array:
    """Pads the queries of x [batch, queries, ...] with zeros to whole tiles."""
    return _pad(x, plan.tiles.queries)


def pad_keys(x: jax.Array, plan: Plan) -> jax.Array:
    """Pads each half of the keys of x [batch, keys, ...] with zeros to whole chunks."""
    chunk = plan.tiles.chunk
    if not (plan.num_noisy % chunk or x.shape[1] % chunk):
        return x
    return jnp.concatenate([_pad(half, chunk) for half in (x[:, : plan.num_noisy], x[:, plan.num_noisy :])], axis=1)


def cut_keys(x: jax.Array, plan: Plan) -> jax.Array:
    """Inverse of pad_keys."""
    if x.shape[1] == plan.num_keys:
        return x
    padded = plan.noisy_chunks * plan.tiles.chunk
    clean = x[:, padded : padded + plan.num_keys - plan.num_noisy]
    return jnp.concatenate([x[:, : plan.num_noisy], clean], axis=1)


def _pad(x, multiple):
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x


def to_parts(x: jax.Array, plan: Plan) -> list[jax.Array]:
    """[kv_heads, chunks, chunk, head_dim] -> one [kv_heads, chunks of a part, chunk, head_dim] a part, zeros added."""
    x = _by_row(x, plan)

    def cut(start, stop, chunks):
        return jnp.pad(x[:, :, start:stop], ((0, 0), (0, 0), (0, chunks - (stop - start)), (0, 0), (0, 0)))

    parts = (jnp.concatenate([cut(*half) for half in halves], axis=2) for halves in _halves_of_parts(plan))
    return [part.reshape(part.shape[0], -1, *part.shape[3:]) for part in parts]


def from_parts(parts: list[jax.Array], plan: Plan) -> jax.Array:
    """Inverse of to_parts."""
    pieces = [], []
    for part, halves in zip(parts, _halves_of_parts(plan), strict=True):
        part, first = _by_row(part, plan.parts[0]), 0
        for of_half, (start, stop, chunks) in zip(pieces, halves, strict=True):
            of_half.append(part[:, :, first : first + stop - start])
            first += chunks
    x = jnp.concatenate([*pieces[0], *pieces[1]], axis=2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _by_row(x, plan):
    return x.reshape(x.shape[0], -1, plan.chunks_per_row, *x.shape[2:])


def _halves_of_parts(plan):
    """Of each part, for its noisy and for its clean keys: (start, stop) among the chunks of a row, and how many chunks
    the part has for them.
    """
    noisy = plan.parts[0].noisy_chunks
    clean = plan.parts[0].chunks_per_row - noisy

    def span(i, first, last, chunks):
        return min(first + i * chunks, last), min(first + (i + 1) * chunks, last), chunks

    return [
        (span(i, 0, plan.noisy_chunks, noisy), span(i, plan.noisy_chunks, plan.chunks_per_row, clean))
        for i in range(len(plan.parts))
    ]
