"""Context parallelism: the tokens of a row are split over the mesh axis "context".

A row is cut into stripes of at most STRIPE tokens, dealt to the c ranks like cards: stripe i belongs to rank i mod c,
in the noisy and the clean half alike. (Striped attention, arXiv 2311.09431, by tiles.) Every rank has early and late
tokens of every document but the shortest ones, so all ranks need about the same number of query-key pairs. Two long
chunks per rank, one from each end of the row, balance rows of a single document only. In rows of 64k tokens packed with
documents of 1024 tokens on average, the busiest of 8 ranks has 1.9 times the mean with them, 1.07 times with stripes.

Communication per layer: every rank gathers the keys and values of the clean half (or of the only half) and puts them in
order of position. The mask of a rank is then simply the bounds of its own queries. Noisy keys stay on their rank, since
a noisy block lies within a stripe. They are gathered too if some block of the batch crosses the border of a stripe: one
that counts from its document's start, or is larger than a stripe. That is decided once per pass, at run time. Gradients
take the same paths back, summed. Once per pass, tokens and bounds are sent to the ranks and the last hidden states are
sent back: outside the layers a row is in order of position, in c equal parts.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention.visibility import Visibility
from llada_jax.errors import InputError

AXIS = "context"
CROSSING = "noisy_keys_of_crossing_blocks"  # scope of what is done only for them
STRIPE = 128  # the positions of a query tile of the kernel, where groups have four heads


def ranks() -> int:
    """Size of the axis in the mesh in force."""
    mesh = sharding.mesh_in_force()
    return 1 if mesh is None else mesh.shape[AXIS]


def stripe_size(length: int, ranks: int) -> int:
    """Returns the tokens per stripe. Each of `ranks` equal parts of a row must deal as many tokens to every rank.

    Raises InputError if the row cannot be cut so.
    """
    if length % ranks**2:
        raise InputError(f"mesh.context={ranks}: rows of {length} tokens, expected a multiple of {ranks**2}")
    return math.gcd(STRIPE, length // ranks**2)


def positions(length: int, ranks: int) -> np.ndarray:
    """int [ranks, length / ranks]: which tokens of a row each rank has, ascending."""
    rounds = np.arange(length).reshape(-1, ranks, stripe_size(length, ranks))
    return np.moveaxis(rounds, 1, 0).reshape(ranks, -1)


def to_ranks(x: jax.Array) -> jax.Array:
    """[batch, halves, length, ...] in order of position -> [batch, halves * length, ...] in the order of the layers:
    rank after rank, and each rank's share of one half after the other. Without the axis, half after half.
    """

    def local(x):
        x = jax.lax.all_to_all(_rounds(x, count, stripe), AXIS, split_axis=3, concat_axis=2, tiled=True)
        return _joined(x, 1)

    if (count := ranks()) == 1:
        return x.reshape(x.shape[0], -1, *x.shape[3:])
    stripe = stripe_size(x.shape[2], count)
    rows, _, length = sharding.spec(("batch", None, "length"), x.shape[:3], sharding.mesh_in_force())
    specs = dict(in_specs=PartitionSpec(rows, None, length), out_specs=PartitionSpec(rows, length))
    return jax.shard_map(local, **specs, check_vma=False)(x)


def to_positions(x: jax.Array, halves: int) -> jax.Array:
    """Inverse of to_ranks."""

    def local(x):
        x = _rounds(x.reshape(x.shape[0], halves, -1, *x.shape[2:]), 1, stripe)
        return _joined(jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=3, tiled=True), 2)

    if (count := ranks()) == 1:
        return x.reshape(x.shape[0], halves, -1, *x.shape[2:])
    stripe = stripe_size(x.shape[1] // halves, count)
    rows, length = sharding.spec(("batch", "length"), x.shape[:2], sharding.mesh_in_force())
    specs = dict(in_specs=PartitionSpec(rows, length), out_specs=PartitionSpec(rows, None, length))
    return jax.shard_map(local, **specs, check_vma=False)(x)


def first(x: jax.Array, count: int) -> jax.Array:
    """Returns the first `count` positions of x [batch, positions, ...] in the order of the layers: a share per rank."""
    if count == x.shape[1]:
        return x
    parts = x.reshape(x.shape[0], ranks(), -1, *x.shape[2:])
    return parts[:, :, : count // ranks()].reshape(x.shape[0], count, *x.shape[2:])


def blocks_cross(visibility: Visibility) -> jax.Array | None:
    """Whether some query sees noisy keys of more than its own stripe: bool scalar; None without the axis.

    A query that sees noisy keys is one of them, as in visibility.block_diffusion.
    """
    if (count := ranks()) == 1:
        return None
    if not visibility.num_noisy:
        return jnp.array(False)
    start, end = visibility.noisy_start, visibility.noisy_end
    stripe = stripe_size(visibility.num_noisy, count)
    return jnp.any((start < end) & (start // stripe != (end - 1) // stripe))


def with_all_keys(attention: Callable) -> Callable:
    """Adapts `attention(query, key, value, mask, *rotary)` to sharding.over_heads, for ranks that have a part of the
    keys.

    mask: over all keys in order of position, noisy ones first, for the rank's queries. crosses: of blocks_cross; None
    if no axis splits the keys.
    """

    def call(query, key, value, mask, crosses, *rotary):
        if crosses is not None:
            key, value = (_all_keys(x, mask.num_noisy, crosses) for x in (key, value))
        return attention(query, key, value, mask, *rotary)

    return call


def _all_keys(x, num_noisy, crosses):
    """[batch, keys of this rank, kv_heads, head_dim] -> [batch, keys, ...]; noisy keys of other ranks may be zeros."""
    own = num_noisy // jax.lax.axis_size(AXIS)
    clean = _gathered(x[:, own:])
    if not own:
        return clean
    noisy = jax.lax.cond(crosses, jax.named_scope(CROSSING)(_gathered), _in_place, x[:, :own])
    return jnp.concatenate([noisy, clean], axis=1)


def _gathered(x):
    return _joined(sharding.gather_axes(_own_rounds(x), (AXIS,), 3, None), 1)


def _in_place(x):
    """As _gathered, with zeros for the tokens of other ranks."""
    x = _own_rounds(x)
    everyone = jnp.zeros((*x.shape[:3], jax.lax.axis_size(AXIS), *x.shape[4:]), x.dtype)
    return _joined(jax.lax.dynamic_update_slice_in_dim(everyone, x, jax.lax.axis_index(AXIS), axis=3), 1)


def _own_rounds(x):
    count = jax.lax.axis_size(AXIS)
    return _rounds(x[:, None], 1, stripe_size(x.shape[1] * count, count))


def _rounds(x, stripes, stripe):
    """[batch, halves, length / ranks, ...] -> [batch, halves, rounds, stripes, stripe, ...]; stripes: how many stripes
    of each round x has, those of all ranks or of one.
    """
    return x.reshape(*x.shape[:2], -1, stripes, stripe, *x.shape[3:])


def _joined(x, axis):
    """Inverse of _rounds; with axis 1 the halves are one array too."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[5:])
