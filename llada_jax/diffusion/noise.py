"""Masking noise: which tokens of x_0 become the mask token in x_t, and at what rate.

The schedule is linear, alpha_t = 1 - t: a token is masked with probability t, and the ELBO's weight
-alpha'_t / (1 - alpha_t) is 1 / t. Keys belong to examples: the noise of a row is a function of (seed, row, draw) and
of nothing else, so it is the same on every mesh, host count and resume.

A key makes either keys or numbers, never both, and every use has its own key. The keys
(fold_in and split of one key agree: split(k, n)[i] is fold_in(k, i)):

    root = key(seed)                                  of config.seed, or of an evaluation's seed
    row = fold_in(fold_in(root, row id), draw)        draw: epoch, DPO's epoch * draws + d, or an estimate's draw
        fold_in(row, TIMES), fold_in(row, MASKS)      uniform numbers, one per position
        fold_in(row, EMBEDDING)                       Gaussian numbers on the embeddings of masked tokens
    a complementary pair shares `row`: the two masks are inverse, so each position has noise in only one of them
    a rejected answer (DPO) and a mirrored draw use another's numbers on purpose
    sampling: fold_in of (request, start of the block, step, position, token), bits of the last only
    order of rows: NumPy's SeedSequence of (seed, epoch)
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import Layout
from llada_jax.errors import InputError

TIMES, MASKS, EMBEDDING = range(3)  # what a row's key is folded with


@dataclasses.dataclass(frozen=True)
class NoiseSpec:
    """How times and masks are drawn. Raises InputError naming the field.

    times: one t per "block", or one per "sequence" (document). rate_low, rate_high: t ~ U[rate_low, rate_high], the
    paper's [alpha_min, alpha_max] band. masking: "bernoulli" masks each token with probability t, independently;
    "fixed_count" masks ceil(t n) of a block's n tokens, uniformly chosen: same expectation over t ~ U[0, 1], less
    variance. spread: the times of a row's blocks form a low-discrepancy sequence instead of independent draws.
    """

    times: str = "block"
    rate_low: float = 1e-3
    rate_high: float = 1.0
    masking: str = "bernoulli"
    spread: bool = False

    def __post_init__(self):
        if self.times not in ("block", "sequence"):
            raise InputError(f'times={self.times!r}, expected "block" or "sequence"')
        if self.masking not in ("bernoulli", "fixed_count"):
            raise InputError(f'masking={self.masking!r}, expected "bernoulli" or "fixed_count"')
        if not (0 <= self.rate_low <= self.rate_high <= 1 and self.rate_high > 0):  # NaN neither
            raise InputError(f"rate_low={self.rate_low}, rate_high={self.rate_high}, expected 0 <= low <= high <= 1")


@flax.struct.dataclass
class Masking:
    """masked [batch, length] bool: which tokens are masked. rate [batch, length] float32: with what probability."""

    masked: jax.Array
    rate: jax.Array


def example_keys(seed: int, examples: jax.Array, draws: jax.Array) -> jax.Array:
    """One key per row of a batch: (seed, example, draw). examples, draws [batch] uint32."""
    return keys_from(jax.random.key(seed, impl="threefry2x32"), examples, draws)


def keys_from(root: jax.Array, examples: jax.Array, draws: jax.Array) -> jax.Array:
    """As `example_keys`, from a key instead of a seed."""
    return jax.vmap(lambda e, d: jax.random.fold_in(jax.random.fold_in(root, e), d))(examples, draws)


@flax.struct.dataclass
class Stratum:
    """Stratified and antithetic draws, for estimates of less variance. Scalars, may be traced.

    index, count: times lie in the index-th of `count` equal parts of the band, so that `count` draws cover it evenly.
    mirrored: the antithetic twin of the draw with the same key, 1 - u for each uniform u. In the band 0 to 1, time t
    becomes 1 - t and each mask its complement (up to one token with fixed_count). Both keep the mean over draws
    unbiased.
    """

    index: jax.Array | int = 0
    count: jax.Array | int = 1
    mirrored: jax.Array | bool = False


def draw_masking(
    keys: jax.Array,
    eligible: jax.Array,
    layout: Layout,
    spec: NoiseSpec,
    source: jax.Array | None = None,
    stratum: Stratum | None = None,
) -> Masking:
    """Draws the masks of a batch.

    keys [batch]: one per row (example_keys). eligible [batch, length] bool: tokens that may be masked. source [batch,
    length] int32: position whose random numbers a token uses, by default its own. Documents with the same sources share
    times and masks; within a document all sources must differ. stratum: None is Stratum().
    """
    length = eligible.shape[1]

    def unit(use):
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, use), (length,)))(keys)

    group_start = layout.block_start if spec.times == "block" else layout.document_start
    u = _spread(unit(TIMES), group_start) if spec.spread else unit(TIMES)
    scores = unit(MASKS)
    if source is not None:
        u, scores = (jnp.take_along_axis(x, source, axis=1) for x in (u, scores))
    u = jnp.take_along_axis(u, group_start, axis=1)
    if stratum is not None:
        u, scores = (jnp.where(stratum.mirrored, 1 - x, x) for x in (u, scores))
        u = (stratum.index + u) / stratum.count
    rate = spec.rate_low + (spec.rate_high - spec.rate_low) * (1 - u)  # 1 - u is in (0, 1]
    if spec.masking == "bernoulli":
        return Masking(eligible & (scores < rate), rate)
    return _fixed_count(rate, scores, eligible, layout)


def _spread(u: jax.Array, group_start: jax.Array) -> jax.Array:
    """u_k = frac(u_0 + k / golden ratio) for the k-th group of a row: each is uniform, together they spread evenly."""
    first = group_start == jnp.arange(group_start.shape[1])[None]
    ordinal = jnp.cumsum(first, axis=1).astype(jnp.uint32) - 1
    step = ordinal * jnp.uint32(2654435769)  # 2^32 / golden ratio: exact, modulo 2^32
    fraction = (step >> 8).astype(jnp.float32) * 2.0**-24
    return jnp.mod(u[:, :1] + fraction, 1.0)


def _fixed_count(rate: jax.Array, scores: jax.Array, eligible: jax.Array, layout: Layout) -> Masking:
    """Masks the ceil(t n) lowest-scored of each block's n eligible tokens."""
    sums = jnp.pad(jnp.cumsum(eligible, axis=1), ((0, 0), (1, 0)))
    start, end = layout.block_start, layout.block_end
    n = jnp.take_along_axis(sums, end, axis=1) - jnp.take_along_axis(sums, start, axis=1)
    count = jnp.clip(jnp.ceil(rate * n), 1, jnp.maximum(n, 1))
    # Sorting by score and then, stably, by block leaves each block in its own places, ordered by score.
    by_score = jnp.argsort(jnp.where(eligible, scores, 2.0), axis=1)
    by_block = jnp.argsort(jnp.take_along_axis(start, by_score, axis=1), axis=1, stable=True)
    place = jnp.argsort(jnp.take_along_axis(by_score, by_block, axis=1), axis=1)
    return Masking(eligible & (place - start < count), count / jnp.maximum(n, 1))


def complement(masking: Masking, eligible: jax.Array) -> Masking:
    """The logical inverse (Section 5.1): together with `masking` each eligible token is masked exactly once.

    The complement of rate t has rate 1 - t, which may leave the band.
    """
    return Masking(eligible & ~masking.masked, 1 - masking.rate)


def mask_tokens(tokens: jax.Array, masking: Masking, mask_id: int) -> jax.Array:
    """x_t: tokens [batch, length] with the masked ones replaced."""
    return jnp.where(masking.masked, mask_id, tokens)
