"""The acceptance rules: which of a block's predictions a step writes.

Each rule is a function of one step's predictions for [rows, block] positions, and treats every row alone. Arguments:
confidence, entropy [rows, block] float32, of the softmax over all logits (sampling/predict.py); masked [rows, block]
bool; due [rows] int, tokens that the schedule asks for; thresholds [rows] float32; forced [rows] bool, None: all true.
It is false for a block that may go on with nothing written: one behind others that are decoded with it; for the rules
with `due`, that is 0 there. Returns bool [rows, block]; ties go to the lowest position.
"""

import jax
import jax.numpy as jnp

_NEAR = 1e-5  # dInfer accepts every position within this of the most confident one


def due(block_length: int, steps: jax.Array, step: jax.Array) -> jax.Array:
    """Tokens due at a step: block_length spread over `steps`, the remainder first (LLaDA2's HF `generate`)."""
    return block_length // steps + (step < block_length % steps)


def llada2(confidence: jax.Array, masked: jax.Array, due: jax.Array, threshold: jax.Array) -> jax.Array:
    """All with confidence > threshold when at least `due` pass it, else the `due` most confident (Section 5.4)."""
    passed = masked & (confidence > threshold[:, None])
    enough = passed.sum(-1, keepdims=True) >= due[:, None]
    return jnp.where(enough, passed, top(confidence, masked, due))


def sglang(
    confidence: jax.Array, masked: jax.Array, threshold: jax.Array, forced: jax.Array | None = None
) -> jax.Array:
    """All with confidence > threshold, or the most confident one: no schedule (SGLang's LowConfidence)."""
    due = jnp.ones(masked.shape[0], jnp.int32) if forced is None else forced.astype(jnp.int32)
    return llada2(confidence, masked, due, threshold)


def dinfer(
    confidence: jax.Array, masked: jax.Array, threshold: jax.Array, predicts_mask: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """All with confidence >= min(threshold, the largest - 1e-5): near-ties with the largest go together (dInfer).

    predicts_mask [rows, block] bool: positions whose first choice is the mask. They are skipped unless no other is left
    (dInfer would loop for ever there). forced: where false, those with confidence >= threshold alone, and no skipped
    ones.
    """
    if predicts_mask is not None:
        sure = masked & ~predicts_mask
        only = sure.any(-1, keepdims=True)
        masked = jnp.where(only if forced is None else only | ~forced[:, None], sure, masked)
    largest = jnp.max(jnp.where(masked, confidence, -jnp.inf), axis=-1)
    least = jnp.minimum(threshold, largest - _NEAR)
    least = least if forced is None else jnp.where(forced, least, threshold)
    return masked & (confidence >= least[:, None])


def entropy(entropy: jax.Array, masked: jax.Array, bound: jax.Array, forced: jax.Array | None = None) -> jax.Array:
    """The positions of lowest entropy, as many as have entropies, the largest not counted, of at most `bound` nats in
    sum; at least one. The sum bounds the mutual dependence of the tokens (EB-Sampler, arXiv 2505.24857). forced: where
    false, the largest counts too, so that there may be none.
    """
    order = jnp.argsort(jnp.where(masked, entropy, jnp.inf), axis=-1, stable=True)
    ascending = jnp.take_along_axis(jnp.where(masked, entropy, 0.0), order, axis=-1)
    counted = jnp.pad(jnp.cumsum(ascending, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    if forced is not None:
        counted = jnp.where(forced[:, None], counted, jnp.cumsum(ascending, axis=-1))
    return top(-entropy, masked, jnp.sum(counted <= bound[:, None], axis=-1))


def fixed(confidence: jax.Array, masked: jax.Array, due: jax.Array) -> jax.Array:
    """The `due` most confident, whatever their confidence."""
    return top(confidence, masked, due)


def top(score: jax.Array, eligible: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [rows] eligible positions with the largest scores [rows, block]; all of them if there are fewer."""
    order = jnp.argsort(jnp.where(eligible, -score, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return eligible & (rank < count[:, None])


def edits(
    confidence: jax.Array, predicted: jax.Array, current: jax.Array, editable: jax.Array, editing_threshold: jax.Array
) -> jax.Array:
    """LLaDA2.1's token-to-token edits (arXiv 2602.08676, Eq. 2): written positions whose prediction differs.

    predicted, current [rows, block] int; an editing threshold of 0 edits wherever the prediction differs.
    """
    return editable & (predicted != current) & (confidence > editing_threshold[:, None])
