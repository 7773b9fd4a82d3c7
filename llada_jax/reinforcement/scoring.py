"""Scores of answers on their noisy copies, and the gradient of the policy loss, one copy at a time.

A copy is one pass over [x_t | x_0] with the block-diffusion mask. With N copies, the elbo's gradient needs the sum over
them before the loss is known. So there are two rounds of passes: without gradients for E of each answer, whose loss has
one derivative per answer, dL/dE; and then, copy by copy, the gradient of dL/dE times the copy's part of E. Activations
are those of one copy and one micro-batch, whatever N is (as in DARE's EBPO and in BGPO, arXiv 2510.11683).
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import make_layout
from llada_jax.micro_batches import map_rows, sum_over, sum_over_rows
from llada_jax.model import head
from llada_jax.model.alignment import predictable
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution, denoised_hidden
from llada_jax.reinforcement.policy import PolicyLoss, PolicySums, sequence_loss, token_loss


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Static. temperature: log probabilities are of softmax(logits / temperature). micro_batches: parts of the rows."""

    model: ModelConfig
    block_size: int
    temperature: float = 1.0
    execution: Execution = Execution()
    micro_batches: int = 1


@flax.struct.dataclass
class ScoredRows:
    """Answers to be scored, rows leading. tokens, segment_ids int32 [rows, length]. hidden bool, weights float32 [rows,
    copies, length]: of Copies. advantage, tokens_scored float32 [rows]. old, reference: the `elbo` or `scores` of the
    policy that answered, and of the frozen one. None: old is the policy itself, and there is no KL term.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    hidden: jax.Array
    weights: jax.Array
    advantage: jax.Array
    tokens_scored: jax.Array
    old: jax.Array | None = None
    reference: jax.Array | None = None


def copy_scores(params, scoring: Scoring, rows: ScoredRows, hidden, weights, entropy: bool = False):
    """(log p, entropy) of a copy's scored tokens, float32 [rows, length], zero elsewhere; nats. hidden, weights [rows,
    length]. entropy: whether to compute it; else zeros.
    """
    config = scoring.model
    layout = make_layout(rows.segment_ids, scoring.block_size)
    positions = jnp.arange(rows.tokens.shape[1])[None] - layout.document_start
    scored = (weights > 0) & predictable(layout, rows.segment_ids, config.alignment)
    noisy = jnp.where(hidden, config.mask_token_id, rows.tokens)
    states = denoised_hidden(params, config, noisy, rows.tokens, layout, positions, scoring.execution)
    if scoring.temperature != 1:
        states = (states / scoring.temperature).astype(states.dtype)
    matrix = head.head_matrix(params, config)
    scores = head.token_scores(
        states, rows.tokens, scored, matrix, 1.0 if entropy else None, scoring.execution.reduce_dtype
    )
    return -scores.nll, scores.entropy


def elbo(params, scoring: Scoring, rows: ScoredRows) -> jax.Array:
    """E of each answer: the weighted log probabilities of all copies, float32 [rows]."""

    def part(rows):
        def one(copy):
            return (copy_scores(params, scoring, rows, *copy)[0] * copy[1]).sum(axis=1)

        return sum_over(one, _copies(rows))

    return map_rows(part, rows, scoring.micro_batches)


def scores(params, scoring: Scoring, rows: ScoredRows) -> jax.Array:
    """log p of each copy's scored tokens, float32 [rows, copies, length], zero elsewhere."""

    def part(rows):
        of_copies = jax.lax.map(lambda copy: copy_scores(params, scoring, rows, *copy)[0], _copies(rows))
        return jnp.moveaxis(of_copies, 0, 1)

    return map_rows(part, rows, scoring.micro_batches)


def mean_entropy(params, scoring: Scoring, rows: ScoredRows) -> jax.Array:
    """Over the scored tokens of the first copy, nats."""

    def part(rows):
        weights = rows.weights[:, 0]
        entropy = copy_scores(params, scoring, rows, rows.hidden[:, 0], weights, entropy=True)[1]
        return jnp.stack([entropy.sum(), (weights > 0).sum().astype(jnp.float32)])

    total, count = sum_over_rows(part, rows, scoring.micro_batches)
    return total / jnp.maximum(count, 1)


def drift(params, scoring: Scoring, rows: ScoredRows, confidence: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, largest) difference between the probabilities that learner and sampler give the same token in the same
    step. rows: with trajectory_copies at shrink 1; confidence float32 [rows, length]: of Rollouts. Rounding alone, if
    both compute the same: below 1e-4 in float32.
    """

    def part(of_rows):
        rows, confidence = of_rows

        def one(copy):
            scored = copy[1] > 0
            logp, _ = copy_scores(params, scoring, rows, *copy)
            apart = jnp.where(scored, jnp.abs(jnp.exp(logp) - confidence), 0)
            return apart.sum(axis=1), apart.max(axis=1), scored.sum(axis=1)

        return tuple(jnp.moveaxis(x, 0, 1) for x in jax.lax.map(one, _copies(rows)))

    total, largest, count = map_rows(part, (rows, confidence), scoring.micro_batches)
    return total.sum() / jnp.maximum(count.sum(), 1), largest.max()


def policy_gradient(
    weights_of: Callable, trained, scoring: Scoring, rows: ScoredRows, loss: PolicyLoss, answers: int | None = None
) -> tuple[dict, PolicySums]:
    """The gradient of the mean loss over answers with respect to `trained`, and the sums of the loss over `rows`.

    weights_of(trained) are the weights of the forward pass. answers: number of all of them, if `rows` lacks some that
    no gradient comes from. An answer without scored tokens has no gradient.
    """
    num_rows = len(rows.tokens) if answers is None else answers
    if loss.estimator == "elbo":
        return _elbo_gradient(weights_of, trained, scoring, rows, loss, num_rows)

    def value(trained, rows, hidden, weights, old, reference):
        logp, _ = copy_scores(weights_of(trained), scoring, rows, hidden, weights)
        old = jax.lax.stop_gradient(logp) if old is None else old
        sums = token_loss(logp, old, reference, rows.advantage, weights, loss)
        return sums.loss / num_rows, sums

    def part(rows):
        copies = *_copies(rows), *jax.tree.map(_leading, (rows.old, rows.reference))
        return sum_over(lambda copy: jax.grad(value, has_aux=True)(trained, rows, *copy), copies)

    return sum_over_rows(part, rows, scoring.micro_batches)


def _elbo_gradient(weights_of, trained, scoring, rows: ScoredRows, loss: PolicyLoss, num_rows: int):
    if rows.old is None and rows.reference is None:
        now = jnp.zeros_like(rows.advantage)  # the ratio is 1, whatever E is
    else:
        now = elbo(weights_of(trained), scoring, rows)
    old = now if rows.old is None else rows.old

    def of_answers(now):
        sums = sequence_loss(now, old, rows.reference, rows.advantage, rows.tokens_scored, loss)
        return sums.loss / num_rows, sums

    slope, sums = jax.grad(of_answers, has_aux=True)(now)

    def value(trained, rows, slope, hidden, weights):
        logp, _ = copy_scores(weights_of(trained), scoring, rows, hidden, weights)
        return ((logp * weights).sum(axis=1) * slope).sum()

    def part(rows_and_slope):
        rows, slope = rows_and_slope
        return sum_over(lambda copy: jax.grad(value)(trained, rows, slope, *copy), _copies(rows))

    return sum_over_rows(part, (rows, slope), scoring.micro_batches), sums


def _copies(rows: ScoredRows):
    """(hidden, weights), copies leading."""
    return _leading(rows.hidden), _leading(rows.weights)


_leading = functools.partial(jnp.moveaxis, source=1, destination=0)
