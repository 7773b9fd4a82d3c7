"""Groups of blocks that are denoised together: training for decoders that write several blocks at once (MultiTF).

A decoder with n active blocks sees all of them noisy, and clean blocks before them only (arXiv 2606.29215). Training
cuts the blocks of an answer into groups: a noisy block sees the noisy blocks of its group up to its own, and the clean
blocks before the group (attention/visibility.block_diffusion). Blocks without a token of an answer, those of prompts
and behind answers, stay alone, and a group ends where an answer does.

Sizes and shifts are data, so that one compiled step has them all. Groups of at most n blocks come in the variants

    size 2 .. n,   shift 0 .. size - 1:   the first `shift` blocks are a group, then come groups of `size` blocks

n (n + 1) / 2 - 1 of them, counted from the start of the document. Row r has variant (r + epoch) modulo their number:
a batch mixes them, and over that many epochs each row has each variant once.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.visibility import Layout


@flax.struct.dataclass
class Groups:
    """int32 [batch]: blocks of a group, and of the first one (see the module's docstring)."""

    size: jax.Array
    shift: jax.Array


def variants(most: int) -> np.ndarray:
    """int32 [variants, 2]: (size, shift) of groups of at most `most` blocks; ((1, 0),) where that is 1."""
    found = [(size, shift) for size in range(2, most + 1) for shift in range(size)]
    return np.array(found or [(1, 0)], np.int32)


def groups_of(row_ids: jax.Array, epochs: jax.Array, most: int) -> Groups:
    """The groups of each row, [batch], by its id and epoch, uint32 [batch]."""
    table = variants(most)
    size, shift = jnp.asarray(table)[(row_ids + epochs) % len(table)].T
    return Groups(size, shift)


def grouped(layout: Layout, groups: Groups, answered: jax.Array) -> Layout:
    """Returns the layout with group_start of these groups. answered [batch, length] bool: tokens of answers."""
    index = jnp.broadcast_to(jnp.arange(answered.shape[1], dtype=jnp.int32), answered.shape)

    def at(x, place):
        return jnp.take_along_axis(x, place, axis=1)

    opens = index == layout.block_start
    ordinal = jnp.cumsum(opens, axis=1, dtype=jnp.int32)
    ordinal = ordinal - at(ordinal, layout.document_start)  # of the block in its document, from 0
    before = jnp.maximum(index - 1, 0)
    joins = answered & at(answered, before) & (ordinal > 0)  # an answer goes on from one block to the next
    joins &= (ordinal - groups.shift[:, None]) % groups.size[:, None] != 0
    start = jax.lax.cummax(jnp.where(opens & ~joins, index, 0), axis=1)
    return layout.replace(group_start=start)
