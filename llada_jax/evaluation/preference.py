"""Held-out preference: does the policy favour the chosen answer more than the reference does (Eq. 7 and 8)?

Scores are estimated as in likelihood.py; chosen and rejected, policy and reference share the masks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import sharding
from llada_jax.diffusion import objectives, preference
from llada_jax.diffusion.preference import Preference
from llada_jax.evaluation.likelihood import ESTIMATOR, slice_rows
from llada_jax.evaluation.report import mean_error, with_error
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution


@dataclasses.dataclass(frozen=True)
class PreferenceEstimate:
    """Statistics over `pairs` pairs, with standard errors; None if a single pair does not determine them.

    Let d be the argument of the sigmoid in Eq. 8 before beta, in nats. accuracy: the share of d > 0; margin: beta times
    the mean of d; variance: that of d.
    """

    accuracy: float
    accuracy_stderr: float | None
    margin: float
    margin_stderr: float | None
    variance: float | None
    variance_stderr: float | None
    pairs: int

    def describe(self) -> str:
        return (
            f"accuracy {with_error(self.accuracy, self.accuracy_stderr, '.3f')}   "
            f"margin {with_error(self.margin, self.margin_stderr)}   "
            f"Var {with_error(self.variance, self.variance_stderr, '.3g', '.2g')} ({self.pairs} pairs)"
        )


def pair_scores(
    params, config: ModelConfig, batch, block_size: int, max_pairs: int, *, draws=8, seed=0, rows_at_once=4,
    shared_noise=True, block_origin="document", execution=Execution(),
) -> np.ndarray:  # fmt: skip
    """The score B of each document in `batch` (data.order.Batch of numpy arrays), averaged over `draws` noise draws.

    Returns float32 [rows, max_pairs, 2]: chosen and rejected.
    """
    objective = objectives.Objective(noise=ESTIMATOR, block_origin=block_origin)
    settings = Preference(shared_noise=shared_noise, max_pairs=max_pairs)
    scores = []
    for start in range(0, len(batch.ids), rows_at_once):
        part = jax.tree.map(functools.partial(slice_rows, start=start, rows=rows_at_once), batch)
        total = np.zeros((rows_at_once, max_pairs, 2), np.float32)
        for draw in range(draws):
            drawn = part.replace(epochs=np.full_like(part.epochs, draw))
            total += jax.device_get(
                _scores(params, config, objective, settings, execution, drawn, np.int32(block_size), np.uint32(seed))
            )
        scores.append(total / np.float32(draws))
    return np.concatenate(scores)[: len(batch.ids)]


@functools.partial(jax.jit, static_argnames=("config", "objective", "settings", "execution"))
def _scores(params, config, objective, settings, execution, batch, block_size, seed):
    example = preference.prepare(batch, seed, block_size, config, objective, settings)
    return sharding.replicated(preference.score(params, config, example, settings.max_pairs, execution=execution))


def pairs_in(segment_ids: np.ndarray) -> int:
    """The largest number of pairs per row; segment_ids [rows, length]."""
    return int(segment_ids.max(initial=0)) // 2


def chosen_only(batch):
    """`batch` with the chosen answers of its pairs as the only supervised tokens."""
    return batch.replace(supervised=batch.supervised & (batch.segment_ids % 2 == 1))


def compare(policy: np.ndarray, reference: np.ndarray, segment_ids: np.ndarray, beta: float) -> PreferenceEstimate:
    """Compares policy and reference, both [rows, max_pairs, 2] from pair_scores of the same rows.

    segment_ids [rows, length]: of these rows, which have at least one pair. beta: of Eq. 8.
    """
    present = np.asarray(preference.pairs_present(jnp.asarray(segment_ids), policy.shape[1]))
    gain = (policy - reference).astype(np.float64)
    difference = (gain[..., 0] - gain[..., 1])[present]
    count = len(difference)
    accuracy, accuracy_stderr = mean_error(difference > 0)
    if count == 1:
        return PreferenceEstimate(accuracy, None, beta * float(difference[0]), None, None, None, 1)
    mean, mean_stderr = mean_error(difference)
    squares = (difference - mean) ** 2
    variance, variance_stderr = (count / (count - 1) * value for value in mean_error(squares))
    return PreferenceEstimate(
        accuracy, accuracy_stderr, beta * mean, beta * mean_stderr, variance, variance_stderr, count
    )
