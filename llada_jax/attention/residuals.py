"""Names of the residuals of attention, other than its operands, so that a remat policy can keep them.

With `jax.checkpoint_policies.save_only_these_names(*NAMES)` the backward pass recomputes a layer up to the operands of
attention, but not attention itself: its output and one float32 per query and head are kept.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAMES = ("attention_output", "attention_log_sum")


def named(output: jax.Array, log_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (output, log_sum) with their names for remat policies."""
    return tuple(checkpoint_name(x, name) for x, name in zip((output, log_sum), NAMES, strict=True))
