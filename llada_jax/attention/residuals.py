"""What the backward pass of an attention needs beside its operands, by name, so that a remat policy can keep it.

With `jax.checkpoint_policies.save_only_these_names(*NAMES)` a layer is computed again up to the operands of attention,
but attention itself is not: its output and a float32 per query and head are kept.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAMES = ("attention_output", "attention_log_sum")


def named(output: jax.Array, log_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(output, log_sum) as remat policies see them."""
    return tuple(checkpoint_name(x, name) for x, name in zip((output, log_sum), NAMES, strict=True))
