"""A token, its probability and the entropy for the positions that need them: argmax, or a draw.

The head is run on the needed positions only, TILE of them at a time, and over VOCAB_TILE tokens at a time with running
maxima and sums: no float32 [positions, vocab] is held. With top-k or top-p the logits of one tile of positions are.
Under a mesh each shard of the vocabulary reduces its own part, and a few scalars a position are combined.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llada_jax import sharding

TILE = 128  # positions; the head is read once for each
VOCAB_TILE = 16_384
TILES = "needed_tiles"  # scope of the loop over them
_LOWEST = -1e30


@flax.struct.dataclass
class Sampling:
    """[rows]: temperature (0: argmax), top_k (0: all), top_p (1: all), and a key for each row."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array


@flax.struct.dataclass
class Prediction:
    """[rows, block]: token int32; confidence, its probability, and entropy (nats, when asked for), float32.

    Of the distribution that is drawn from: softmax(logits / temperature) cut to the top k, then to the nucleus p, the
    order of LLaDA2's HF `generate`; at temperature 0, softmax(logits). Zero where none was needed.
    """

    token: jax.Array
    confidence: jax.Array
    entropy: jax.Array


class Kind(NamedTuple):
    """What is compiled in. mask_id is never predicted. sample, cut: whether a row may have a temperature, a top-k or
    top-p; entropy: whether it is computed."""

    mask_id: int
    sample: bool = False
    cut: bool = False
    entropy: bool = False


def predict(head: jax.Array, hidden: jax.Array, needed: jax.Array, sampling: Sampling, kind: Kind) -> Prediction:
    """Predictions for the positions where `needed` [rows, block] bool.

    head [embed, vocab]; hidden [rows, block, embed], aligned with the tokens they predict. A draw is a function of the
    row's key, the position in the block and the token id, by the Gumbel-max trick: not of the other rows, of tiles or
    of the mesh.
    """
    if (mesh := sharding.mesh_in_force()) is None:
        return _predict(head, hidden, needed, sampling, kind, None)
    rows = sharding.spec(("batch", None, None), hidden.shape, mesh)
    vocab = sharding.spec((None, "vocab"), head.shape, mesh)
    local = functools.partial(_predict, kind=kind, vocab_axis=vocab[1])
    row = PartitionSpec(rows[0])
    return jax.shard_map(local, in_specs=(vocab, rows, row, row), out_specs=row, check_vma=False)(
        head, hidden, needed, sampling
    )


def _predict(head, hidden, needed, sampling, kind, vocab_axis) -> Prediction:
    rows, block, embed = hidden.shape
    positions = rows * block
    tile = min(TILE, positions)
    flat = hidden.reshape(positions, embed)
    # Needed positions first; the padding is out of bounds: reads fill, writes drop.
    order = jnp.nonzero(needed.reshape(-1), size=-(-positions // tile) * tile, fill_value=positions)[0]

    def one_tile(i, found):
        index = jax.lax.dynamic_slice_in_dim(order, i * tile, tile)
        row = jnp.minimum(index // block, rows - 1)
        settings = jax.tree.map(lambda x: x[row], sampling)
        if kind.sample:
            settings = settings.replace(key=jax.vmap(jax.random.fold_in)(settings.key, index % block))
        part = flat.at[index].get(mode="fill", fill_value=0)
        scored = _score(head, part, settings, kind, vocab_axis)
        return jax.tree.map(lambda whole, x: whole.at[index].set(x, mode="drop"), found, scored)

    zeros = jnp.zeros(positions, jnp.float32)
    nothing = Prediction(jnp.zeros(positions, jnp.int32), zeros, zeros)
    with jax.named_scope(TILES):
        found = jax.lax.fori_loop(0, -(-needed.sum() // tile), one_tile, nothing)
    return jax.tree.map(lambda x: x.reshape(rows, block), found)


class _Running(NamedTuple):
    """Over the tokens seen so far, [positions]: the best of z + noise, its token and its z; the maximum of z, the sum
    of exp(z - maximum), and of z exp(z - maximum)."""

    best: jax.Array
    token: jax.Array
    z: jax.Array
    highest: jax.Array
    total: jax.Array
    weighted: jax.Array


def _score(head, hidden, settings: Sampling, kind: Kind, vocab_axis) -> Prediction:
    """Predictions [positions] for hidden [positions, embed]; settings' fields are [positions] too."""
    vocab = head.shape[1]
    offset = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * vocab

    def scaled_logits(start, width, seen):
        """(ids [width] of a tile of the vocabulary, z float32 [positions, width]); -inf for what does not count."""
        weights = jax.lax.dynamic_slice_in_dim(head, start, width, axis=1).astype(hidden.dtype)
        z = jnp.dot(hidden, weights, preferred_element_type=jnp.float32)
        local = start + jnp.arange(width)
        ids = offset + local
        z = jnp.where(((ids == kind.mask_id) | (local < seen))[None], -jnp.inf, z)
        return ids, z / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None] if kind.sample else z

    positions = hidden.shape[0]
    lowest, zeros = jnp.full(positions, _LOWEST), jnp.zeros(positions)
    state = _Running(jnp.full(positions, -jnp.inf), jnp.zeros(positions, jnp.int32), lowest, lowest, zeros, zeros)
    if kind.cut:  # the cut depends on all logits of a position
        ids, z = scaled_logits(0, vocab, 0)
        state = _fold(state, ids, _cut(z, settings, vocab_axis), settings, kind)
    else:
        width = min(VOCAB_TILE, vocab)

        def visit(i, state):  # the last tile may overlap the one before
            ids, z = scaled_logits(jnp.minimum(i * width, vocab - width), width, i * width)
            return _fold(state, ids, z, settings, kind)

        state = jax.lax.fori_loop(0, -(-vocab // width), visit, state) if width < vocab else visit(0, state)
    if vocab_axis is not None:
        state = _combine(state, vocab_axis)
    log_norm = state.highest + jnp.log(state.total)
    return Prediction(state.token, jnp.exp(state.z - log_norm), log_norm - state.weighted / state.total)


def _fold(state: _Running, ids, z, settings, kind: Kind) -> _Running:
    score = z
    if kind.sample:
        score = z + jnp.where(settings.temperature > 0, 1.0, 0.0)[:, None] * _gumbel(settings.key, ids)
    at = jnp.argmax(score, axis=-1)[:, None]
    best, chosen_z = jnp.take_along_axis(score, at, -1)[:, 0], jnp.take_along_axis(z, at, -1)[:, 0]
    better = best > state.best
    highest = jnp.maximum(state.highest, z.max(axis=-1))
    kept, weights = jnp.exp(state.highest - highest), jnp.exp(z - highest[:, None])
    weighted = state.weighted
    if kind.entropy:
        weighted = weighted * kept + jnp.sum(jnp.where(weights > 0, weights * z, 0.0), axis=-1)
    return _Running(
        jnp.where(better, best, state.best),
        jnp.where(better, ids[at[:, 0]], state.token),
        jnp.where(better, chosen_z, state.z),
        highest,
        state.total * kept + weights.sum(axis=-1),
        weighted,
    )


def _combine(state: _Running, vocab_axis) -> _Running:
    """The state over the whole vocabulary from those of its shards; a tie goes to the lowest shard."""
    shards = jax.lax.all_gather(state, vocab_axis)
    winner = jnp.argmax(shards.best, axis=0)[None]
    best, token, z = (jnp.take_along_axis(x, winner, axis=0)[0] for x in shards[:3])
    highest = shards.highest.max(axis=0)
    scale = jnp.exp(shards.highest - highest[None])
    return _Running(best, token, z, highest, jnp.sum(scale * shards.total, 0), jnp.sum(scale * shards.weighted, 0))


def _gumbel(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise, float32 [positions, ids]: of each (key, token id) the same, wherever it is computed."""

    def bits(key, token):
        return jax.random.key_data(jax.random.fold_in(key, token)).reshape(-1)[0]

    high = jax.vmap(jax.vmap(bits, (None, 0)), (0, None))(keys, ids) >> 9
    uniform = (high.astype(jnp.float32) + 0.5) * 2.0**-23  # in (0, 1)
    return -jnp.log(-jnp.log(uniform))


def _cut(z: jax.Array, settings: Sampling, vocab_axis) -> jax.Array:
    """z [positions, vocab] with -inf outside the top k and, of what that leaves, outside the nucleus p.

    The nucleus is the smallest set of most probable tokens whose probability exceeds p. Ties at an edge all stay.
    """

    def over_vocab(reduce, x):
        return x if vocab_axis is None else reduce(x, vocab_axis)

    def keep(z, weights, limit):
        """The largest z while their weights add up to at most `limit` [positions], and the one that passes it."""
        bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
        rank = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # ordered as z is

        def one_bit(i, edge):
            candidate = edge | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
            above = jnp.sum(jnp.where(rank >= candidate[:, None], weights, 0.0), axis=-1)
            return jnp.where(over_vocab(jax.lax.psum, above) > limit, candidate, edge)

        edge = jax.lax.fori_loop(0, 32, one_bit, jnp.zeros(z.shape[0], jnp.uint32))
        return jnp.where(rank >= edge[:, None], z, -jnp.inf)

    greedy = settings.temperature == 0
    whole = greedy | (settings.top_k == 0)
    z = keep(z, jnp.ones_like(z), jnp.where(whole, jnp.inf, settings.top_k - 0.5))
    weights = jnp.exp(z - over_vocab(jax.lax.pmax, z.max(axis=-1))[:, None])
    total = over_vocab(jax.lax.psum, weights.sum(axis=-1))
    return keep(z, weights, jnp.where(greedy | (settings.top_p >= 1), jnp.inf, settings.top_p * total))
