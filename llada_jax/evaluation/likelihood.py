"""Likelihood: the NELBO with standard errors, at any block size or as full-sequence MDLM, and the AR likelihood.

Every estimate is a mean over noise draws and unbiased for the NELBO (Eq. 1 with weight 1/t over t ~ U[0, 1]). The
options differ in variance:
- masking "fixed_count": k of the n tokens of a block, k uniform on 1 .. n, weight n / k (LLaDA's get_log_likelihood).
  Its variance is finite. "bernoulli": each token with probability t; finite only with rates clipped at 1e-3.
- times "stratified": the draws of a row divide the range of t; "antithetic": pairs of t and 1 - t with complementary
  masks; "independent".
The blocks of a row have evenly spread times. At block size 1 every token is masked and the estimate is exact.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import sharding
from llada_jax.diffusion import noise, objectives
from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution

ESTIMATOR = noise.NoiseSpec(rate_low=0.0, masking="fixed_count", spread=True)
TIMES = ("independent", "antithetic", "stratified")


@dataclasses.dataclass(frozen=True)
class Draws:
    """The noise of an estimate: `samples` draws per row, with times as in `times`; `repeats` independent such sets."""

    samples: int = 1
    times: str = "stratified"
    masking: str = "fixed_count"
    repeats: int = 1

    def __post_init__(self):
        if self.times not in TIMES:
            raise InputError(f"times={self.times!r}, expected one of {', '.join(TIMES)}")
        if not (self.samples >= 1 and self.repeats >= 1):
            raise InputError(f"samples={self.samples}, repeats={self.repeats}, expected at least 1")
        if self.times == "antithetic" and self.samples % 2:
            raise InputError(f"samples={self.samples}: antithetic times come in pairs, expected an even number")

    @property
    def spec(self) -> noise.NoiseSpec:
        rate_low = 1e-3 if self.masking == "bernoulli" else 0.0
        return dataclasses.replace(ESTIMATOR, masking=self.masking, rate_low=rate_low)

    def key_and_part(self, draw: int) -> tuple[int, noise.Stratum]:
        """(what the row's key is folded with, its part) of draw 0 .. samples * repeats - 1, set after set."""
        if self.times == "antithetic":
            return draw // 2, noise.Stratum(mirrored=bool(draw % 2))
        if self.times == "stratified":
            return draw, noise.Stratum(draw % self.samples, self.samples)
        return draw, noise.Stratum()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """nats: per token. stderr: standard error over rows, noise included; None for a single row. tokens: the number of
    scored tokens. noise_stderr: standard error over the noise on the same rows, from the spread of the repeats; None
    for a single repeat.
    """

    nats: float
    stderr: float | None
    tokens: int
    noise_stderr: float | None = None


def block_nelbo(
    params, config: ModelConfig, batch, block_size: int | None, *, samples=1, times="stratified", masking="fixed_count",
    repeats=1, seed=0, rows_at_once=4, block_origin="global", document_mask=True, execution=Execution(),
) -> Estimate:  # fmt: skip
    """Estimates the NELBO per token of the rows of `batch` (data.order.Batch of numpy arrays).

    block_size: tokens per block; None: full-sequence MDLM. samples, times, masking, repeats: the noise, as in Draws,
    which raises InputError. seed: of that noise. rows_at_once: rows per pass. block_origin, document_mask: as in
    objectives.Objective, by default what evaluation compares by.

    Example:
        >>> import jax, llada_jax
        >>> model = llada_jax.load_checkpoint("checkpoint")
        >>> batch = llada_jax.make_batch(jax.random.randint(jax.random.key(1), (2, 32), 0, 256))
        >>> found = llada_jax.block_nelbo(model.params, model.config, batch, block_size=8, samples=2)
        >>> found.tokens, 5 < found.nats < 8  # random weights: about log(512)
        (64, True)
    """
    draws = Draws(samples, times, masking, repeats)
    return summarize(
        *row_nelbo(
            params, config, batch, block_size, draws, seed=seed, rows_at_once=rows_at_once,
            block_origin=block_origin, document_mask=document_mask, execution=execution,
        )
    )  # fmt: skip


def row_nelbo(
    params, config: ModelConfig, batch, block_size: int | None, draws: Draws, *, seed=0, rows_at_once=4,
    block_origin="global", document_mask=True, execution=Execution(),
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns (NELBO per row and set of draws, nats [rows, repeats] float64; tokens scored [rows] int64)."""
    objective = objectives.Objective(noise=draws.spec, block_origin=block_origin, document_mask=document_mask)
    halves = "noisy" if block_size is None else "both"
    size = batch.ids.shape[1] if block_size is None else block_size
    if size == 1 and draws.masking == "fixed_count":  # exact: more draws would be the same one
        draws = dataclasses.replace(draws, samples=1, times="stratified")
    score = functools.partial(_row_sums, params, config, objective, halves, execution, size, jnp.uint32(seed))
    return over_draws(score, batch, draws, rows_at_once)


def ar_nll(params, config: ModelConfig, batch, *, rows_at_once=4, execution=Execution()) -> Estimate:
    """Next-token negative log-likelihood per token, with a causal mask: one pass, exact. Returns an Estimate."""
    return summarize(*row_ar_nll(params, config, batch, rows_at_once=rows_at_once, execution=execution))


def row_ar_nll(
    params, config: ModelConfig, batch, *, rows_at_once=4, execution=Execution()
) -> tuple[np.ndarray, np.ndarray]:
    """As row_nelbo, [rows, 1]."""
    shifted = config.replace(alignment="shifted")
    score = functools.partial(_row_sums, params, shifted, objectives.Objective(), "clean", execution, 1, 0)
    return over_draws(score, batch, Draws(), rows_at_once)


def predicted_at_once(
    params, config: ModelConfig, batch, block_size: int | str | None, *, rows_at_once=4, execution=Execution()
) -> np.ndarray:
    """bool [rows]: whether every scored token is the most probable one when its whole block is masked.

    block_size: as in block_nelbo, or "ar" for the causal pass.
    """
    halves = {None: "noisy", "ar": "clean"}.get(block_size, "both")
    if block_size == "ar":
        config, block_size = config.replace(alignment="shifted"), 1
    size = batch.ids.shape[1] if block_size is None else block_size
    objective = objectives.Objective(noise=noise.NoiseSpec(rate_low=1.0))
    score = functools.partial(_row_errors, params, config, objective, halves, execution, size)
    return over_draws(score, batch, Draws(), rows_at_once)[0][:, 0] == 0


def summarize(values: np.ndarray, counts: np.ndarray) -> Estimate:
    """The Estimate of rows with `values` [rows, repeats] in nats and `counts` [rows] tokens."""
    total, count = values.mean(1), counts.astype(np.float64)
    tokens = max(count.sum(), 1)
    mean = total.sum() / tokens
    real = int((count > 0).sum())
    # Ratio estimator over rows: each row is one cluster of tokens.
    stderr = math.sqrt(((total - mean * count) ** 2).sum() * real / (real - 1)) / tokens if real > 1 else None
    noise_stderr = None
    if (repeats := values.shape[1]) > 1:
        noise_stderr = math.sqrt(values.var(1, ddof=1).sum() / repeats) / tokens
    return Estimate(float(mean), stderr, int(count.sum()), noise_stderr)


def estimate_fields(estimate: Estimate, scored_bytes: int | None) -> dict:
    """The fields of the estimate, plus the perplexity per token (inf on overflow) and the bits per byte of a text with
    `scored_bytes` bytes (None: unknown).
    """
    bits = estimate.nats * estimate.tokens / math.log(2) / scored_bytes if scored_bytes else None
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(estimate.nats))
    return dataclasses.asdict(estimate) | {"perplexity": perplexity, "bits_per_byte": bits}


def weighted_mean(estimates: Sequence[Estimate], shares: Sequence[float]) -> Estimate:
    """The likelihood of a mixture: the mean over its components, weighted by shares that sum to 1."""
    if len(estimates) == 1:
        return estimates[0]
    nats = sum(share * estimate.nats for estimate, share in zip(estimates, shares, strict=True))
    errors = [estimate.stderr for estimate in estimates]
    stderr = None
    if None not in errors:
        stderr = math.hypot(*(share * error for error, share in zip(errors, shares, strict=True)))
    return Estimate(nats, stderr, sum(estimate.tokens for estimate in estimates))


def slice_rows(x: np.ndarray, start: int, rows: int) -> np.ndarray:
    """Rows start .. start + rows; past the end they are zero, which is padding."""
    x = x[start : start + rows]
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def over_draws(score, batch, draws: Draws, rows_at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages score(rows of the batch, key, part) -> (nats, tokens) per row over all draws, as in row_nelbo."""
    values, counts = [], []
    for start in range(0, len(batch.ids), rows_at_once):
        rows = jax.tree.map(functools.partial(slice_rows, start=start, rows=rows_at_once), batch)
        sets = np.zeros((rows_at_once, draws.repeats))
        for draw in range(draws.samples * draws.repeats):
            key, part = draws.key_and_part(draw)
            nats, count = jax.device_get(score(rows, jnp.uint32(key), part))
            sets[:, draw // draws.samples] += nats.astype(np.float64) / draws.samples
        values.append(sets)
        counts.append(count)
    num_rows = len(batch.ids)
    return np.concatenate(values)[:num_rows], np.concatenate(counts)[:num_rows].astype(np.int64)


@functools.partial(jax.jit, static_argnames=("config", "objective", "halves", "execution"))
def _row_sums(params, config, objective, halves, execution, block_size, seed, batch, draw, part):
    """(sum of weighted nll, number of tokens) of each row, float32 [rows]."""
    example = draw_example(config, objective, halves, block_size, seed, batch, draw, part)
    _, scores = objectives.score(params, config, example, halves, execution)
    return sharding.replicated(((scores.nll * example.weights).sum(1), example.eligible.sum(1)))


@functools.partial(jax.jit, static_argnames=("config", "objective", "halves", "execution"))
def _row_errors(params, config, objective, halves, execution, block_size, batch, draw, part):
    """(tokens that are not the most probable ones, number of tokens) of each row."""
    example = draw_example(config, objective, halves, block_size, 0, batch, draw, part)
    _, scores = objectives.score(params, config, example, halves, execution)
    count = example.eligible.sum(1)
    return sharding.replicated((count - scores.correct.sum(1), count))


def draw_example(config, objective, halves, block_size, seed, batch, draw, part: noise.Stratum) -> objectives.Example:
    """The batch under the noise of one draw: a function of (seed, row id, draw, part)."""
    keys = noise.example_keys(seed, batch.row_ids, jnp.full_like(batch.epochs, draw))
    arrays = batch.ids, batch.segment_ids, batch.supervised
    return objectives.prepare(*arrays, keys, block_size, config, objective, halves, stratum=part)
