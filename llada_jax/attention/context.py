"""Context parallelism: the tokens of a row are shared out over the mesh axis "context".

A row is cut in chunks of at most CHUNK tokens that are dealt to the c ranks back and forth: 0, 1, .., c - 1, c - 1, ..,
1, 0, 0, 1, .. So every rank has early and late tokens of each stretch of 2 c chunks, the same ones of the noisy and of
the clean half, and needs about as many query-key pairs as every other rank, in short documents too.

What moves in a layer: keys and values of the clean half (of a pass with one half, of that), which every rank gathers
and puts in order of position. The mask of a rank is then the bounds of its own queries, as they were. Noisy keys stay
where they are, since a noisy block lies within a chunk; only when some block of the batch crosses a chunk's border (one
that counts from its document's start, or is larger than a chunk) are they gathered too, which is decided once a pass,
at run time. Gradients go the same ways back, summed. Once a pass, tokens and bounds go to the ranks, and the last
hidden states come back: outside the layers a row lies in order of position, in c equal parts.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention.visibility import Visibility
from llada_jax.errors import InputError

AXIS = "context"
CROSSING = "noisy_keys_of_crossing_blocks"  # scope of what is done only for them
CHUNK = 128  # tokens: the positions of a query tile of the kernel, where groups have four heads


def ranks() -> int:
    """Size of the axis in the mesh in force."""
    mesh = sharding.mesh_in_force()
    return 1 if mesh is None else mesh.shape[AXIS]


def chunk_size(length: int, ranks: int) -> int:
    """Tokens of a chunk: each of `ranks` equal parts of a row must be whole stretches of 2 * ranks chunks.

    Raises InputError where the row cannot be cut so.
    """
    if length % (2 * ranks**2):
        raise InputError(f"mesh.context={ranks}: rows of {length} tokens, expected a multiple of {2 * ranks**2}")
    return math.gcd(CHUNK, length // (2 * ranks**2))


def positions(length: int, ranks: int) -> np.ndarray:
    """int [ranks, length / ranks]: which tokens of a row each rank has, ascending."""
    stretches = np.arange(length).reshape(-1, 2, ranks, chunk_size(length, ranks))
    stretches[:, 1] = stretches[:, 1, ::-1]
    return np.moveaxis(stretches, 2, 0).reshape(ranks, -1)


def to_ranks(x: jax.Array) -> jax.Array:
    """[batch, halves, length, ...] in order of position -> [batch, halves * length, ...] as the layers have it: what
    each rank has of every half, rank after rank. Without the axis, half after half.
    """

    def local(x):
        x = _turned(_stretches(x, count, chunk))
        return _joined(jax.lax.all_to_all(x, AXIS, split_axis=4, concat_axis=2, tiled=True), 1)

    if (count := ranks()) == 1:
        return x.reshape(x.shape[0], -1, *x.shape[3:])
    chunk = chunk_size(x.shape[2], count)
    rows, _, length = sharding.spec(("batch", None, "length"), x.shape[:3], sharding.mesh_in_force())
    specs = dict(in_specs=PartitionSpec(rows, None, length), out_specs=PartitionSpec(rows, length))
    return jax.shard_map(local, **specs, check_vma=False)(x)


def to_positions(x: jax.Array, halves: int) -> jax.Array:
    """Inverse of to_ranks."""

    def local(x):
        x = _stretches(x.reshape(x.shape[0], halves, -1, *x.shape[2:]), 1, chunk)
        x = jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=4, tiled=True)
        return _joined(_turned(x), 2)

    if (count := ranks()) == 1:
        return x.reshape(x.shape[0], halves, -1, *x.shape[2:])
    chunk = chunk_size(x.shape[1] // halves, count)
    rows, length = sharding.spec(("batch", "length"), x.shape[:2], sharding.mesh_in_force())
    specs = dict(in_specs=PartitionSpec(rows, length), out_specs=PartitionSpec(rows, None, length))
    return jax.shard_map(local, **specs, check_vma=False)(x)


def first(x: jax.Array, count: int) -> jax.Array:
    """Of x [batch, positions, ...] as the layers have it, the first `count` positions: of each rank its share."""
    if count == x.shape[1]:
        return x
    parts = x.reshape(x.shape[0], ranks(), -1, *x.shape[2:])
    return parts[:, :, : count // ranks()].reshape(x.shape[0], count, *x.shape[2:])


def blocks_cross(visibility: Visibility) -> jax.Array | None:
    """Whether some query sees noisy keys of more than its own chunk: bool scalar; None without the axis.

    A query that sees noisy keys is one of them, as in visibility.block_diffusion.
    """
    if (count := ranks()) == 1:
        return None
    if not visibility.num_noisy:
        return jnp.array(False)
    start, end = visibility.noisy_start, visibility.noisy_end
    chunk = chunk_size(visibility.num_noisy, count)
    return jnp.any((start < end) & (start // chunk != (end - 1) // chunk))


def with_all_keys(attention):
    """`attention(query, key, value, mask)` as sharding.over_heads runs it, for a rank with a part of the keys.

    mask: of all keys in order of position, noisy ones first, and of the rank's queries. crosses: of blocks_cross; None
    where no axis splits the keys.
    """

    def call(query, key, value, mask, crosses):
        if crosses is not None:
            key, value = (_all_keys(x, mask.num_noisy, crosses) for x in (key, value))
        return attention(query, key, value, mask)

    return call


def _all_keys(x, num_noisy, crosses):
    """[batch, keys of this rank, kv_heads, head_dim] -> [batch, keys, ...]; noisy ones that nobody here sees are 0."""
    own = num_noisy // jax.lax.axis_size(AXIS)
    clean = _gathered(x[:, own:])
    if not own:
        return clean
    noisy = jax.lax.cond(crosses, jax.named_scope(CROSSING)(_gathered), _in_place, x[:, :own])
    return jnp.concatenate([noisy, clean], axis=1)


def _gathered(x):
    x = jax.lax.all_gather(_own_stretches(x), AXIS, axis=4, tiled=True)
    return _joined(_turned(x), 1)


def _in_place(x):
    """As _gathered, with zeros for the tokens of other ranks."""
    x = _own_stretches(x)
    everyone = jnp.zeros((*x.shape[:4], jax.lax.axis_size(AXIS), *x.shape[5:]), x.dtype)
    x = jax.lax.dynamic_update_slice_in_dim(everyone, x, jax.lax.axis_index(AXIS), axis=4)
    return _joined(_turned(x), 1)


def _own_stretches(x):
    count = jax.lax.axis_size(AXIS)
    return _stretches(x[:, None], 1, chunk_size(x.shape[1] * count, count))


def _stretches(x, held, chunk):
    """[batch, halves, length / ranks, ...] -> [batch, halves, stretches, 2, held, chunk, ...]; held: chunks that are
    here of each half of a stretch, those of all ranks or of one.
    """
    return x.reshape(*x.shape[:2], -1, 2, held, chunk, *x.shape[3:])


def _turned(x):
    """Between order of position and order of ranks: the second half of a stretch is dealt from the last rank on."""
    return jnp.concatenate([x[:, :, :, :1], jnp.flip(x[:, :, :, 1:], axis=4)], axis=3)


def _joined(x, axis):
    """Inverse of _stretches; with axis 1 the halves are one array too."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[6:])
