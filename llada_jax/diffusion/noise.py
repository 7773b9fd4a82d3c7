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
        fold_in(row, FLOORS)                          uniform numbers, one per position: least rates of groups
        fold_in(row, REPLACING_TIMES), fold_in(row, REPLACING), fold_in(row, REPLACEMENTS)
                                                      uniform numbers, one per position: rates, places and ids of
                                                      wrong tokens (diffusion/editing.py)
        fold_in(row, DRAFTS)                          uniform numbers of a row: its thresholds (diffusion/drafts.py)
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

# What a row's key is folded with.
TIMES, MASKS, EMBEDDING, FLOORS, REPLACING_TIMES, REPLACING, REPLACEMENTS, DRAFTS = range(8)

TIMES_OF = ("block", "sequence", "chain")
MASKINGS = ("bernoulli", "fixed_count", "floor_count")


@dataclasses.dataclass(frozen=True)
class NoiseSpec:
    """How times and masks are drawn. Raises InputError naming the field.

    times: one t per "block", or one per "sequence" (document); "chain": one per block, not decreasing along a group of
    blocks, as a decoder has written more of its first blocks (the chain_uniform of arXiv 2606.29215):
    L ~ U[rate_low, rate_high], t_0 ~ U[L, rate_high], t_i ~ U[t_{i-1}, rate_high]. rate_low, rate_high: t ~ U[rate_low,
    rate_high], the paper's [alpha_min, alpha_max] band. masking: "bernoulli" masks each token with probability t,
    independently; "fixed_count" masks ceil(t n) of a block's n tokens, uniformly chosen: same expectation over
    t ~ U[0, 1], less variance; "floor_count" masks floor(t n) of them. spread: the times of a row's blocks form a
    low-discrepancy sequence instead of independent draws.
    """

    times: str = "block"
    rate_low: float = 1e-3
    rate_high: float = 1.0
    masking: str = "bernoulli"
    spread: bool = False

    def __post_init__(self):
        for field, choices in (("times", TIMES_OF), ("masking", MASKINGS)):
            if getattr(self, field) not in choices:
                raise InputError(f"{field}={getattr(self, field)!r}, expected one of {', '.join(choices)}")
        if self.spread and self.times == "chain":
            raise InputError('spread=True: the times of times="chain" depend on each other')
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
    times and masks; within a document all sources must differ. stratum: None is Stratum(); not with times="chain".
    """
    length = eligible.shape[1]
    start_of_time = layout.document_start if spec.times == "sequence" else layout.block_start
    u, scores, floors = (uniform(keys, use, length) for use in (TIMES, MASKS, FLOORS))
    if spec.spread:
        u = _spread(u, start_of_time)
    if source is not None:
        u, scores, floors = (jnp.take_along_axis(x, source, axis=1) for x in (u, scores, floors))
    u = jnp.take_along_axis(u, start_of_time, axis=1)
    if stratum is not None:
        u, scores = (jnp.where(stratum.mirrored, 1 - x, x) for x in (u, scores))
        u = (stratum.index + u) / stratum.count
    left = 1 - u  # in (0, 1]
    if spec.times == "chain":
        left = 1 - _chain(left, 1 - floors, layout)
    rate = spec.rate_low + (spec.rate_high - spec.rate_low) * left
    if spec.masking == "bernoulli":
        return Masking(eligible & (scores < rate), rate)
    return _fixed_count(rate, scores, eligible, layout, spec.masking == "fixed_count")


def uniform(keys: jax.Array, use: int, length: int) -> jax.Array:
    """Uniform numbers of one use of each row's key: float32 [batch, length]."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, use), (length,)))(keys)


def segmented_scan(operator, first: jax.Array, values: jax.Array) -> jax.Array:
    """Inclusive scan of `operator` along axis 1 that begins anew wherever `first` [batch, length] bool is set."""

    def join(before, after):
        begins, value = after
        return before[0] | begins, jnp.where(begins, value, operator(before[1], value))

    return jax.lax.associative_scan(join, (first, values), axis=1)[1]


def _chain(left: jax.Array, floor_left: jax.Array, layout: Layout) -> jax.Array:
    """(rate_high - t) / (rate_high - rate_low) of times="chain": the product of what each draw of the group, up to the
    block, leaves of the band above it. left, floor_left [batch, length]: of the draws of blocks and of L, in (0, 1].
    """
    index = jnp.arange(left.shape[1])[None]
    first = layout.group_start == index
    of_block = jnp.where(layout.block_start == index, left, 1)
    factors = jnp.where(first, of_block * floor_left, of_block)
    return segmented_scan(jnp.multiply, first, factors)


def _spread(u: jax.Array, group_start: jax.Array) -> jax.Array:
    """u_k = frac(u_0 + k / golden ratio) for the k-th group of a row: each is uniform, together they spread evenly."""
    first = group_start == jnp.arange(group_start.shape[1])[None]
    ordinal = jnp.cumsum(first, axis=1).astype(jnp.uint32) - 1
    step = ordinal * jnp.uint32(2654435769)  # 2^32 / golden ratio: exact, modulo 2^32
    fraction = (step >> 8).astype(jnp.float32) * 2.0**-24
    return jnp.mod(u[:, :1] + fraction, 1.0)


def _fixed_count(rate: jax.Array, scores: jax.Array, eligible: jax.Array, layout: Layout, up: bool) -> Masking:
    """Masks the ceil(t n) lowest-scored of each block's n eligible tokens; floor(t n), where not `up`."""
    sums = jnp.pad(jnp.cumsum(eligible, axis=1), ((0, 0), (1, 0)))
    start, end = layout.block_start, layout.block_end
    n = jnp.take_along_axis(sums, end, axis=1) - jnp.take_along_axis(sums, start, axis=1)
    count = jnp.clip(jnp.ceil(rate * n), 1, jnp.maximum(n, 1)) if up else jnp.floor(rate * n)
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
