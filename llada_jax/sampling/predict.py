"""Predicts a token, its probability and the entropy at the positions that need them: by argmax, or by a draw.

The head runs on the needed positions only, a tile of them at a time and at most VOCAB_TILE tokens at a time, with
running maxima and sums: no float32 [positions, vocab] is ever in memory. With top-k or top-p the logits of one tile of
positions are. Under a mesh every device has its own part of the vocabulary, for the positions of all rows, so that the
head is read once by all devices together; a few scalars per position are combined.

Probabilities are those of the softmax over all logits, the mask token's among them, as HF's `generate`, SGLang and
dInfer compute them: mass on the mask makes the others less sure. The mask is never predicted: where it is the argmax,
or is drawn, the best other token (or the next of the draw) stands in with its own probability.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llada_jax import sharding

TILE = 128  # positions on one device; the head is read once for each
MESH_TILE = 256  # on a mesh, whose devices read a part of the head each
VOCAB_TILE = 16_384
LANES = 128  # of a register of TPUs: widths of vocabulary tiles are multiples
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
    """Arrays [rows, block], zero where no prediction was needed. token int32. confidence float32: its probability.
    entropy float32, nats: zero unless asked for. mask bool: the mask itself came first (with PredictSettings.raw only).

    Confidence is that of the distribution that tokens are drawn from: softmax(logits / temperature) cut to the top k,
    then to the nucleus p, the order of LLaDA2's HF `generate`; at temperature 0, softmax(logits). The cuts count the
    mask too, and never remove the best other token. Entropy is that before the cuts. With PredictSettings.raw,
    confidence is that of softmax(logits) at any temperature.
    """

    token: jax.Array
    confidence: jax.Array
    entropy: jax.Array
    mask: jax.Array


class PredictSettings(NamedTuple):
    """Static settings, compiled in. mask_id: never predicted. sample, cut: whether a row may have a temperature, or a
    top-k or top-p. entropy: whether to compute it. raw: confidence as dInfer has it, and where the mask came first."""

    mask_id: int
    sample: bool = False
    cut: bool = False
    entropy: bool = False
    raw: bool = False


def predict(
    head: jax.Array, hidden: jax.Array, needed: jax.Array, sampling: Sampling, settings: PredictSettings,
    banned: jax.Array | None = None,
) -> Prediction:  # fmt: skip
    """Returns predictions for the positions in `needed` [rows, block] bool.

    head [embed, vocab]; hidden [rows, block, embed], aligned with the tokens they predict. banned [rows, block, ids]
    int32: tokens that, like the mask, are not predicted at a position, although they count in its softmax; -1 is none.
    A draw is a function of the row's key, the position in the block and the token id alone (Gumbel-max trick): other
    rows, tiles and the mesh do not change it. So a draw with the first one banned is a second one without replacement.
    """
    if (mesh := sharding.mesh_in_force()) is None:
        return _predict(head, hidden, needed, sampling, banned, settings, _Vocabulary(head, ()), TILE)
    row = PartitionSpec(sharding.spec(("batch",), hidden.shape[:1], mesh)[0])
    vocab = sharding.spec((None, "vocab"), head.shape, mesh)
    row_axes, vocab_axes = (sharding.axes_of(entry) for entry in (row[0], vocab[1]))

    def local(head, *of_rows):
        of_rows = jax.tree.map(lambda x: sharding.gather_axes(x, row_axes, 0), of_rows) if row_axes else of_rows
        prediction = _predict(head, *of_rows, settings, _Vocabulary(head, vocab_axes, row_axes), MESH_TILE)
        own = len(needed) // sharding.num_parts("batch", len(needed))
        first = jax.lax.axis_index(row_axes) * own if row_axes else 0
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, own), prediction)

    run = jax.shard_map(local, in_specs=(vocab, row, row, row, row), out_specs=row, check_vma=False)
    return run(head, hidden, needed, sampling, banned)


def num_tiles(positions: int, on_mesh: bool) -> int:
    """Of so many needed positions of all rows: how often the head is read."""
    return -(-positions // (MESH_TILE if on_mesh else TILE))


class _Vocabulary:
    """A device's part of the vocabulary: columns `first` .. `end` - 1 of its part of the head, whose token ids start at
    `offset`. axes: the mesh axes over which the parts are split, in the order of the ids.

    head [embed, vocab / head_axes]: split over head_axes; each part is shared out over `row_axes`.
    """

    def __init__(self, head: jax.Array, head_axes: tuple[str, ...], row_axes: tuple[str, ...] = ()):
        columns, self.axes = head.shape[1], head_axes + row_axes
        self.offset = jax.lax.axis_index(head_axes) * columns if head_axes else 0
        self.size = -(-columns // (jax.lax.axis_size(row_axes) if row_axes else 1))
        self.first = jax.lax.axis_index(row_axes) * self.size if row_axes else 0
        self.end = jnp.minimum(self.first + self.size, columns)


def _predict(head, hidden, needed, sampling, banned, settings, vocabulary: _Vocabulary, tile: int) -> Prediction:
    rows, block, embed = hidden.shape
    positions = rows * block
    tile = min(tile, positions)
    flat = hidden.reshape(positions, embed)
    # Needed positions first; the padding is out of bounds: reads fill, writes drop.
    order = jnp.nonzero(needed.reshape(-1), size=-(-positions // tile) * tile, fill_value=positions)[0]

    def one_tile(i, prediction):
        index = jax.lax.dynamic_slice_in_dim(order, i * tile, tile)
        row = jnp.minimum(index // block, rows - 1)
        tile_sampling = jax.tree.map(lambda x: x[row], sampling)
        if settings.sample:
            keys = jax.vmap(jax.random.fold_in)(tile_sampling.key, index % block)
            tile_sampling = tile_sampling.replace(key=keys)
        tile_hidden = flat.at[index].get(mode="fill", fill_value=0)
        tile_banned = jnp.full((tile, 1), settings.mask_id)
        if banned is not None:
            of_tile = banned.reshape(positions, -1).at[index].get(mode="fill", fill_value=-1)
            tile_banned = jnp.concatenate([tile_banned, of_tile], axis=1)
        scored = _score(head, tile_hidden, tile_sampling, tile_banned, settings, vocabulary)
        return jax.tree.map(lambda whole, x: whole.at[index].set(x, mode="drop"), prediction, scored)

    zeros = jnp.zeros(positions, jnp.float32)
    nothing = Prediction(jnp.zeros(positions, jnp.int32), zeros, zeros, zeros > 0)
    with jax.named_scope(TILES):
        prediction = jax.lax.fori_loop(0, -(-needed.sum() // tile), one_tile, nothing)
    return jax.tree.map(lambda x: x.reshape(rows, block), prediction)


class _RunningStats(NamedTuple):
    """Running statistics over the tokens seen so far, each [positions]; z: logits / temperature.

    best, token, z: the largest z + noise among tokens that are not banned, its token and its z. highest: maximum of z.
    total: sum of exp(z - highest) over tokens that are not cut off. uncut, weighted, raw: sums over all tokens of
    exp(z - highest), z exp(z - highest) and exp(temperature (z - highest)). mask: z + noise of the mask.
    """

    best: jax.Array
    token: jax.Array
    z: jax.Array
    highest: jax.Array
    total: jax.Array
    uncut: jax.Array
    weighted: jax.Array
    raw: jax.Array
    mask: jax.Array


def _score(head, hidden, sampling: Sampling, banned, settings: PredictSettings, vocabulary: _Vocabulary) -> Prediction:
    """Predictions [positions] for hidden [positions, embed]; sampling's fields are [positions] too. banned [positions,
    ids]: the mask, and others.
    """
    columns = head.shape[1]

    def scaled_logits(start, width):
        """(ids [width], z float32 [positions, width]) of columns from `start` on; -inf for those of other tiles."""
        read = jnp.minimum(start, columns - width)
        weights = jax.lax.dynamic_slice_in_dim(head, read, width, axis=1).astype(hidden.dtype)
        z = jnp.dot(hidden, weights, preferred_element_type=jnp.float32)
        column = read + jnp.arange(width)
        z = jnp.where(((column < start) | (column >= vocabulary.end))[None], -jnp.inf, z)
        return vocabulary.offset + column, z / temperature[:, None] if settings.sample else z

    positions = hidden.shape[0]
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    lowest, zeros, never = jnp.full(positions, _LOWEST), jnp.zeros(positions), jnp.full(positions, -jnp.inf)
    token = jnp.zeros(positions, jnp.int32)
    state = _RunningStats(never, token, lowest, lowest, zeros, zeros, zeros, zeros, never)
    if settings.cut:  # the cut depends on all logits of a position
        ids, z = scaled_logits(vocabulary.first, vocabulary.size)
        allowed = _cut(z, ids, sampling, banned, vocabulary.axes)
        state = _fold(state, ids, z, allowed, sampling, banned, settings)
    else:
        tiles = -(-vocabulary.size // VOCAB_TILE)
        width = min(-(-vocabulary.size // (tiles * LANES)) * LANES, columns)

        def visit(i, state):
            ids, z = scaled_logits(vocabulary.first + i * width, width)
            return _fold(state, ids, z, z, sampling, banned, settings)

        state = jax.lax.fori_loop(0, tiles, visit, state) if tiles > 1 else visit(0, state)
    if vocabulary.axes:
        state = _combine(state, temperature, vocabulary.axes)
    above = state.z - state.highest
    confidence = jnp.exp(above * temperature) / state.raw if settings.raw else jnp.exp(above) / state.total
    entropy = state.highest + jnp.log(state.uncut) - state.weighted / state.uncut if settings.entropy else zeros
    return Prediction(state.token, confidence, entropy, state.mask > state.best)


def _fold(state: _RunningStats, ids, z, allowed, sampling, banned, settings: PredictSettings) -> _RunningStats:
    """Returns the state with one more tile of tokens. z [positions, ids]; allowed: z with -inf for tokens cut off."""
    score = allowed
    if settings.sample:
        score = allowed + jnp.where(sampling.temperature > 0, 1.0, 0.0)[:, None] * _gumbel(sampling.key, ids)
    is_mask = (ids == settings.mask_id)[None]
    of_mask = jnp.where(is_mask, score, -jnp.inf).max(axis=-1) if settings.raw else state.mask
    score = jnp.where(_is_among(banned, ids), -jnp.inf, score)
    at = jnp.argmax(score, axis=-1)[:, None]
    best, chosen_z = (jnp.take_along_axis(x, at, -1)[:, 0] for x in (score, z))
    better = best > state.best
    highest = jnp.maximum(state.highest, z.max(axis=-1))
    weights, before = jnp.exp(z - highest[:, None]), jnp.exp(state.highest - highest)

    def sum_of(old, new):
        return old * before + jnp.sum(new, axis=-1)

    uncut, weighted, raw = state.uncut, state.weighted, state.raw
    total = sum_of(state.total, jnp.where(allowed > -jnp.inf, weights, 0.0) if settings.cut else weights)
    if settings.entropy:
        uncut = sum_of(uncut, weights) if settings.cut else total
        weighted = sum_of(weighted, jnp.where(weights > 0, weights * z, 0.0))
    if settings.raw and settings.sample:
        temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
        raw = raw * before**temperature + jnp.sum(jnp.exp((z - highest[:, None]) * temperature[:, None]), axis=-1)
    elif settings.raw:
        raw = total
    return _RunningStats(
        jnp.where(better, best, state.best),
        jnp.where(better, ids[at[:, 0]], state.token),
        jnp.where(better, chosen_z, state.z),
        highest,
        total,
        uncut,
        weighted,
        raw,
        jnp.maximum(state.mask, of_mask),
    )


def _is_among(banned: jax.Array, ids: jax.Array) -> jax.Array:
    """bool [positions, vocab]."""
    return (banned[:, :, None] == ids[None, None]).any(axis=1)


def _combine(state: _RunningStats, temperature, axes) -> _RunningStats:
    """The state over the whole vocabulary from those of its parts; a tie goes to the lowest part."""
    shards = jax.lax.all_gather(state, axes)
    winner = jnp.argmax(shards.best, axis=0)[None]
    best, token, z = (jnp.take_along_axis(x, winner, axis=0)[0] for x in shards[:3])
    highest = shards.highest.max(axis=0)
    scale = jnp.exp(shards.highest - highest[None])
    sums = [jnp.sum(scale * x, 0) for x in (shards.total, shards.uncut, shards.weighted)]
    raw = jnp.sum(scale ** temperature[None] * shards.raw, 0)
    return _RunningStats(best, token, z, highest, *sums, raw, shards.mask.max(axis=0))


def _gumbel(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise, float32 [positions, ids]: a function of (key, token id), wherever it is computed."""

    def bits(key, token):
        return jax.random.key_data(jax.random.fold_in(key, token)).reshape(-1)[0]

    high = jax.vmap(jax.vmap(bits, (None, 0)), (0, None))(keys, ids) >> 9
    uniform = (high.astype(jnp.float32) + 0.5) * 2.0**-23  # in (0, 1)
    return -jnp.log(-jnp.log(uniform))


def _cut(z: jax.Array, ids: jax.Array, sampling: Sampling, banned: jax.Array, axes) -> jax.Array:
    """z [positions, vocab] with -inf outside the top k and, of what that leaves, outside the nucleus p.

    The nucleus is the smallest set of most probable tokens whose probability exceeds p. Ties at an edge all stay, and
    so does the best token that is not banned: there would be nothing to write where the mask alone is left.
    """

    def over_vocab(reduce, x):
        return reduce(x, axes) if axes else x

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

    best = jnp.where(_is_among(banned, ids), -jnp.inf, z).max(axis=-1)
    best = jnp.where(z >= over_vocab(jax.lax.pmax, best)[:, None], z, -jnp.inf)  # and above: banned ones
    greedy = sampling.temperature == 0
    whole = greedy | (sampling.top_k == 0)
    z = keep(z, jnp.ones_like(z), jnp.where(whole, jnp.inf, sampling.top_k - 0.5))
    weights = jnp.exp(z - over_vocab(jax.lax.pmax, z.max(axis=-1))[:, None])
    total = over_vocab(jax.lax.psum, weights.sum(axis=-1))
    return jnp.maximum(
        best, keep(z, weights, jnp.where(greedy | (sampling.top_p >= 1), jnp.inf, sampling.top_p * total))
    )
