"""Direct preference optimisation on the diffusion ELBO (Section 5.3, Eq. 7 and 8).

    B(theta; y | x) = E_t [ sum_i w_t 1[y_t^i = MASK] log p_theta(y^i | ...) ]                        (Eq. 7)
    L = -log sigmoid( beta [ (B(theta; y_w) - B(ref; y_w)) - (B(theta; y_l) - B(ref; y_l)) ] )        (Eq. 8)

A packed row holds pairs of adjacent documents: segments 1 and 2 are the chosen and the rejected answer to one prompt,
3 and 4 the next pair. Policy and reference always see the same noise; chosen and rejected share it position by
position, as far as both reach (variance reduction as in VRPO, arXiv 2505.19223).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import Layout
from llada_jax.diffusion import noise, objectives
from llada_jax.errors import check_range
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.parameters import Params


@dataclasses.dataclass(frozen=True)
class Preference:
    """Settings of DPO. beta: of Eq. 8. draws: noise samples averaged per score (the paper's is 1). shared_noise: the
    rejected answer uses the times and masks of the chosen one. max_pairs: most pairs in a row. Raises InputError naming
    the field.
    """

    beta: float = 0.1
    draws: int = 1
    shared_noise: bool = True
    max_pairs: int = 16

    def __post_init__(self):
        for field in ("beta", "draws", "max_pairs"):
            check_range(f"preference.{field}", getattr(self, field), above=0)


@flax.struct.dataclass
class PreferenceSums:
    """Sums over the pairs of a batch, float32 scalars. difference: the argument of the sigmoid in Eq. 8 over beta."""

    loss: jax.Array
    correct: jax.Array  # the chosen answer gained more than the rejected one
    difference: jax.Array
    squared_difference: jax.Array
    pairs: jax.Array


def shared_source(layout: Layout, segment_ids: jax.Array) -> jax.Array:
    """Returns `source` of noise.draw_masking, int32 [batch, length]: a rejected answer uses its chosen one's numbers.

    segment_ids [batch, length] int: odd documents are chosen, even ones rejected.
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = jax.vmap(lambda i, s: jax.ops.segment_min(i, s, num_segments=segment_ids.shape[1] + 1))(index, segment_ids)
    chosen_start = jnp.take_along_axis(starts, jnp.maximum(segment_ids - 1, 0), axis=1)
    rejected = (segment_ids > 0) & (segment_ids % 2 == 0)
    return jnp.where(rejected, index - layout.document_start + chosen_start, index)


def prepare(
    batch,
    seed: int,
    block_size: jax.Array | int,
    model: ModelConfig,
    objective: objectives.Objective,
    settings: Preference,
    halves: str = "both",
) -> objectives.Example:
    """Draws `settings.draws` noise samples of each row. Returns an Example with leaves [rows, draws, ...].

    batch: data.order.Batch of arrays. Draw d of a row in epoch e has the key (seed, row, e * draws + d), so its scores
    can be computed at any time.
    """
    source = shared_source if settings.shared_noise else None
    rows = jax.tree.map(lambda x: jnp.repeat(x, settings.draws, axis=0), batch)
    draw = jnp.tile(jnp.arange(settings.draws, dtype=jnp.uint32), len(batch.ids))
    keys = noise.example_keys(seed, rows.row_ids, rows.epochs * settings.draws + draw)
    example = objectives.prepare(
        rows.ids, rows.segment_ids, rows.supervised, keys, block_size, model, objective, halves, source
    )
    return jax.tree.map(lambda x: x.reshape(-1, settings.draws, *x.shape[1:]), example)


def score(
    params: Params,
    model: ModelConfig,
    example: objectives.Example,
    max_pairs: int,
    halves: str = "both",
    execution: Execution = Execution(),
) -> jax.Array:
    """Returns B of each document (Eq. 7), the mean over draws: float32 [rows, max_pairs, 2], chosen and rejected.

    example: of `prepare`.
    """
    draws = example.clean.shape[1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), example)
    _, tokens = objectives.score(params, model, flat, halves, execution)
    scores = document_scores(tokens.nll, flat.weights, flat.segment_ids, max_pairs)
    return scores.reshape(-1, draws, *scores.shape[1:]).mean(1)


def document_scores(nll: jax.Array, weights: jax.Array, segment_ids: jax.Array, max_pairs: int) -> jax.Array:
    """Returns B of each document, float32 [batch, max_pairs, 2]: chosen and rejected; zero for missing documents.

    nll, weights, segment_ids [batch, length].
    """

    def one_row(values, segments):
        return jax.ops.segment_sum(values, segments, num_segments=2 * max_pairs + 1)[1:]

    return jax.vmap(one_row)(-nll * weights, segment_ids).reshape(-1, max_pairs, 2)


def preference_loss(policy: jax.Array, reference: jax.Array, present: jax.Array, beta: float) -> PreferenceSums:
    """Eq. 8, summed over the pairs that are present.

    policy, reference float32 [batch, max_pairs, 2]: scores B, chosen and rejected. present [batch, max_pairs] bool.
    """
    gain = policy - reference
    difference = jnp.where(present, gain[..., 0] - gain[..., 1], 0.0)
    loss = jnp.where(present, jax.nn.softplus(-beta * difference), 0.0)
    return PreferenceSums(
        loss=loss.sum(),
        correct=(present & (difference > 0)).sum().astype(jnp.float32),
        difference=difference.sum(),
        squared_difference=jnp.square(difference).sum(),
        pairs=present.sum().astype(jnp.float32),
    )


def pairs_present(segment_ids: jax.Array, max_pairs: int) -> jax.Array:
    """Returns bool [batch, max_pairs]: pairs whose two documents are both in the row."""
    return jnp.max(segment_ids, axis=1, keepdims=True) >= 2 * (jnp.arange(max_pairs)[None] + 1)
