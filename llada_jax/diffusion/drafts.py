"""Multi-turn forward: x_t as the decoder would have left it after some passes (arXiv 2602.08676, Section 3.1).

K - 1 passes without gradient, each followed by what the decoder does with its predictions (sampling/accept.py, rules
"llada2.1" and "sglang"):

    Gamma = {masked, p_i > threshold}, or the most confident masked token of a block where none passes
    Delta = {not masked, argmax_i is not x_i, p_i > editing threshold}                         (Eq. 1 and 2)

write argmax_i on both. p is of the softmax over all logits. Neither the mask is written nor LLaDA2.2's tokens that
delete and insert: drafts move no tokens. Of blocks that are denoised together only the first has to accept one. The
loss is that of the last draft. Which rows are drafted, and their thresholds, are drawn per row
(diffusion/editing.Editing); with thresholds of 0 and no edits the draft is OPUT's.
"""

import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import Layout
from llada_jax.diffusion.noise import DRAFTS, segmented_scan, uniform
from llada_jax.diffusion.objectives import Example, Objective, unwritten_ids
from llada_jax.model import head
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution, denoised_hidden
from llada_jax.model.parameters import Params


def draft(
    params: Params, config: ModelConfig, example: Example, objective: Objective, halves: str, execution: Execution
) -> Example:  # fmt: skip
    """Returns the example with `noisy` and `hidden` of the last draft, and which rows are `drafted`; the rest is as it
    was (objectives.weighted).

    halves: "both" or "noisy", as in schedule.Phase. Nothing of it is differentiated.
    """
    editing = objective.editing
    coin, *u = uniform(example.keys, DRAFTS, 3).T[:, :, None]
    drafted = coin < editing.draft_share
    threshold = editing.threshold_low + (editing.threshold_high - editing.threshold_low) * u[0]
    editing_threshold = editing.editing_low + (editing.editing_high - editing.editing_low) * u[1]
    writable = example.writable & drafted
    edits = editing.editing_low < 1

    def turn(carry, _):
        noisy, hidden = carry
        clean = example.clean if halves == "both" else None
        states = denoised_hidden(params, config, noisy, clean, example.layout, example.positions, execution)
        needed = writable if edits else writable & hidden
        token, confidence = head.best_tokens(states, needed, head.head_matrix(params, config), unwritten_ids(config))
        written = accepted(confidence, writable & hidden, threshold, example.layout)
        noisy = jnp.where(written, token, noisy)
        if edits:
            edited = writable & ~hidden & (confidence > editing_threshold)
            noisy = jnp.where(edited, token, noisy)
        return (noisy, hidden & ~written), None

    (noisy, hidden), _ = jax.lax.scan(turn, (example.noisy, example.hidden), length=editing.turns - 1)
    return example.replace(noisy=noisy, hidden=hidden, drafted=drafted[:, 0])


def accepted(confidence: jax.Array, masked: jax.Array, threshold: jax.Array, layout: Layout) -> jax.Array:
    """Gamma: bool [batch, length]. confidence float32, masked bool [batch, length]; threshold float32 [batch, 1].

    sampling/accept.sglang, for blocks of any size in a row.
    """
    passed = masked & (confidence > threshold)
    scores = jnp.where(masked, confidence, -jnp.inf)
    best = masked & (scores == _over_block(jnp.maximum, scores, layout))
    index = jnp.broadcast_to(jnp.arange(masked.shape[1]), masked.shape)
    lowest = _over_block(jnp.minimum, jnp.where(best, index, masked.shape[1]), layout)  # ties
    forced = (index == lowest) & (layout.block_start == layout.group_start)
    return passed | (forced & ~_over_block(jnp.logical_or, passed, layout))


def _over_block(operator, x: jax.Array, layout: Layout) -> jax.Array:
    """`operator` over all of each position's block: [batch, length]."""
    opens = layout.block_start == jnp.arange(x.shape[1])[None]
    return jnp.take_along_axis(segmented_scan(operator, opens, x), layout.block_end - 1, axis=1)
