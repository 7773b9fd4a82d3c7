"""Likelihood: the block NELBO with a standard error, and the AR negative log-likelihood.

The NELBO is estimated with a fixed number of masks per block (k uniform on 1 .. n, weight n / k: the same expectation
as Bernoulli masks with weight 1 / t over t ~ U[0, 1], far less variance) and evenly spread k across blocks. At block
size 1 every token is masked and the estimate is exact.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import sharding
from llada_jax.diffusion import noise, objectives
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution

ESTIMATOR = noise.NoiseSpec(rate_low=0.0, masking="fixed_count", spread=True)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """nats per token, its standard error over rows, and the number of tokens scored (once each)."""

    nats: float
    stderr: float
    tokens: int


def block_nelbo(
    params, config: ModelConfig, batch, block_size: int, *, samples=1, seed=0, rows_at_once=4,
    block_origin="global", execution=Execution(),
) -> Estimate:  # fmt: skip
    """NELBO per token of the rows of `batch` (data.order.Batch, numpy), averaged over `samples` draws of the noise."""
    objective = objectives.Objective(noise=ESTIMATOR, block_origin=block_origin)
    return _estimate(params, config, objective, batch, block_size, "both", samples, seed, rows_at_once, execution)


def ar_nll(params, config: ModelConfig, batch, *, rows_at_once=4, execution=Execution()) -> Estimate:
    """Next-token negative log-likelihood per token of the AR model of these weights: causal, one pass, exact."""
    shifted = config.replace(alignment="shifted")
    return _estimate(params, shifted, objectives.Objective(), batch, 1, "clean", 1, 0, rows_at_once, execution)


def _estimate(params, config, objective, batch, block_size, halves, samples, seed, rows_at_once, execution):
    totals, counts = [], []
    for start in range(0, len(batch.ids), rows_at_once):
        part = jax.tree.map(functools.partial(slice_rows, start=start, rows=rows_at_once), batch)
        for sample in range(samples):
            sums = _row_sums(
                params, config, objective, halves, execution, part, np.uint32(sample), np.int32(block_size), seed
            )
            total, count = jax.device_get(sums)
            totals.append(total / samples)
            counts.append(count / samples)
    rows = -(-len(batch.ids) // rows_at_once)
    total = np.concatenate(np.reshape(totals, (rows, samples, rows_at_once)).sum(1)).astype(np.float64)
    count = np.concatenate(np.reshape(counts, (rows, samples, rows_at_once)).sum(1)).astype(np.float64)
    mean = total.sum() / max(count.sum(), 1)
    real = int((count > 0).sum())
    # Ratio estimator over rows: each row is one cluster of tokens.
    spread = math.sqrt(((total - mean * count) ** 2).sum() * real / max(real - 1, 1))
    return Estimate(float(mean), spread / max(count.sum(), 1), int(round(count.sum())))


def slice_rows(x: np.ndarray, start: int, rows: int) -> np.ndarray:
    """Rows start .. start + rows; past the end they are zero, so padding."""
    x = x[start : start + rows]
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


@functools.partial(jax.jit, static_argnames=("config", "objective", "halves", "execution"))
def _row_sums(params, config, objective, halves, execution, batch, draw, block_size, seed):
    """(sum of weighted nll, number of tokens) of each row, float32 [rows]."""
    keys = noise.example_keys(seed, batch.row_ids, jnp.full_like(batch.epochs, draw))
    example = objectives.prepare(
        batch.ids, batch.segment_ids, batch.supervised, keys, block_size, config, objective, halves
    )
    _, scores = objectives.score(params, config, example, halves, execution)
    sums = (scores.nll * example.weights).sum(1), example.eligible.sum(1).astype(jnp.float32)
    return sharding.replicated(sums)
