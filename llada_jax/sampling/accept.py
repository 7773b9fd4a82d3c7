"""Which of a block's predictions are written in a step: the acceptance rules.

Each rule is a function of one step's predictions for [rows, block] positions; every row stands for itself.
"""

import jax
import jax.numpy as jnp


def schedule(block_length: int, steps: int) -> list[int]:
    """Tokens due at each step: block_length spread over `steps`, the remainder first (LLaDA2's HF `generate`)."""
    return [block_length // steps + (step < block_length % steps) for step in range(steps)]


def accept_llada2(confidence: jax.Array, masked: jax.Array, due: jax.Array, threshold: jax.Array) -> jax.Array:
    """All masked positions with confidence > threshold when at least `due` pass it, else the `due` most confident.

    Section 5.4. confidence [rows, block] float32; masked [rows, block] bool; due [rows] int. Returns bool
    [rows, block]. Ties go to the lowest position.
    """
    passed = masked & (confidence > threshold)
    enough = passed.sum(-1, keepdims=True) >= due[:, None]
    return jnp.where(enough, passed, top(confidence, masked, due))


def top(confidence: jax.Array, eligible: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [rows] most confident eligible positions (or all of them, when they are fewer)."""
    order = jnp.argsort(jnp.where(eligible, -confidence, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return eligible & (rank < count[:, None])


def edits(confidence, predicted, current, editable, editing_threshold) -> jax.Array:
    """LLaDA2.1's token-to-token edits (arXiv 2602.08676, Eq. 2): written positions whose prediction differs.

    All [rows, block] but the threshold; an editing threshold of 0 edits wherever the prediction differs.
    """
    return editable & (predicted != current) & (confidence > editing_threshold)
