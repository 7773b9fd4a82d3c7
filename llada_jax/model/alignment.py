"""Which hidden state predicts token i: its own ("same") or its predecessor's ("shifted").

LLaDA2 predicts token i at position i. A converted AR model predicts it at position i - 1, as it was trained to; in the
two-stream pass that predecessor is read in the noisy half when it lies in token i's own group of blocks, which is its
own block where blocks are denoised one by one, else in the clean half, which can see the true token i - 1 and all
before it. At block size 1 this is the AR model exactly.
"""

import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import Layout


def align(noisy: jax.Array | None, clean: jax.Array | None, layout: Layout, alignment: str) -> jax.Array:
    """Returns hidden states [batch, length, embed] aligned with the tokens they predict.

    noisy, clean [batch, length, embed]: hidden states of the two halves; None where the pass has one half only. The
    first token of a document has no predecessor: its state is zero, so its logits are uniform.
    """
    if alignment == "same":
        return clean if noisy is None else noisy
    index = jnp.arange(layout.group_start.shape[1])[None, :, None]
    previous_noisy = None if noisy is None else jnp.roll(noisy, 1, axis=1)
    previous_clean = None if clean is None else jnp.roll(clean, 1, axis=1)
    if noisy is None or clean is None:
        previous = previous_clean if noisy is None else previous_noisy
    else:
        previous = jnp.where(layout.group_start[..., None] < index, previous_noisy, previous_clean)
    return jnp.where(layout.document_start[..., None] < index, previous, 0)


def predictable(layout: Layout, segment_ids: jax.Array, alignment: str) -> jax.Array:
    """Returns bool [batch, length]: tokens that the model can predict. Excludes padding and, if alignment is "shifted",
    the first token of each document.
    """
    real = segment_ids > 0
    if alignment == "same":
        return real
    return real & (layout.document_start < jnp.arange(segment_ids.shape[1])[None])
