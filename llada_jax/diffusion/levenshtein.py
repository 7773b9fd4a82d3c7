"""Training labels of LLaDA2.2's Levenshtein editing: which edits bring a draft nearer to its target (P22, Eq. 2, 3).

The labels follow a longest common subsequence of draft and target in each block. Its matches are anchors:

    an anchor                            its target token; INSERT where the target has more tokens than the draft
                                         between this anchor and the one before
    the k-th position between anchors    the k-th target token between them
    a position beyond those              DELETE, and so is all behind the last anchor

sampling/levenshtein.py carries edits out. An INSERT makes room for one token, so that a draft may need several rounds.
Published are these rules. Ours is the choice among longest subsequences (`anchors`).
"""

import jax
import jax.numpy as jnp


def labels_of_rows(
    draft: jax.Array, target: jax.Array, writable: jax.Array, segment_ids: jax.Array, block_size: int, **ids: int
) -> jax.Array:  # fmt: skip
    """int32 [batch, length]: `labels` of packed rows, whose blocks count from the start of the row; block_size divides
    their length. A mask of the draft may match any target.

    writable [batch, length] bool: what the decoder writes, the rest being prompts. segment_ids [batch, length] int. A
    block of several documents, or with a prompt behind an answer, has its target tokens as labels: no edit may move
    tokens from one answer into another. ids: mask_id, delete_id and insert_id of `labels`.
    """

    def blocks(x):
        return x.reshape(len(x), -1, block_size)

    draft, target, writable, segment_ids = (blocks(x) for x in (draft, target, writable, segment_ids))
    editable = (segment_ids == segment_ids[..., :1]).all(-1) & (writable[..., 1:] >= writable[..., :-1]).all(-1)
    found = labels(draft, target, fixed=~writable, **ids)
    return jnp.where(editable[..., None], found, target).reshape(len(draft), -1)


def labels(
    draft: jax.Array, target: jax.Array, mask_id: int, delete_id: int, insert_id: int, fixed: jax.Array | None = None,
    masks_match: bool = True,
) -> jax.Array:  # fmt: skip
    """int32 [..., block]: what the model is to predict at each position of a draft.

    draft, target [..., block] int32: blocks, however batched. fixed [..., block] bool: the part of a prompt at the
    beginning of a block, equal in both; it stays, and its labels are its tokens. masks_match: a mask of the draft may
    match any target token, as in the first rounds of LLaDA2.2. Without it a mask never does: masks behind the last
    anchor are to be deleted, and the masks that fill their places again.
    """
    match = anchors(draft, target, mask_id, fixed, masks_match)
    block = draft.shape[-1]
    place = jnp.broadcast_to(jnp.arange(block), match.shape)
    anchor = match >= 0
    # The anchors before and behind each position, in the draft and in the target; -1 and `block` where there is none.
    before, target_before = (_last_before(x, anchor) for x in (place, match))
    next_target = jax.lax.cummin(jnp.where(anchor, match, block), axis=match.ndim - 1, reverse=True)
    aligned = target_before + place - before
    deleted = (next_target == block) | (aligned >= next_target)
    more = match - target_before > place - before
    at = jnp.clip(jnp.where(anchor, match, aligned), 0, block - 1)
    tokens = jnp.take_along_axis(target, at, axis=-1)
    return jnp.where(anchor, jnp.where(more, insert_id, tokens), jnp.where(deleted, delete_id, tokens))


def anchors(
    draft: jax.Array, target: jax.Array, mask_id: int, fixed: jax.Array | None = None, masks_match: bool = True
) -> jax.Array:
    """int32 [..., block]: the target index that each position of the draft matches in a longest common subsequence, -1
    where it matches none. Arguments are those of `labels`.

    Of the longest ones it is the one that a walk from the last position to the first finds: a position is an anchor if
    one that is left has it as one, and its target index is the nearest to its own of those that are possible, the
    lower of two as near.
    """
    fixed = jnp.zeros(draft.shape, bool) if fixed is None else fixed
    batch, block = draft.shape[:-1], draft.shape[-1]
    flat = [x.reshape(-1, block) for x in (draft, target, fixed)]

    def of_block(draft, target, fixed):
        matches = draft[:, None] == target[None]
        if masks_match:
            matches |= (draft == mask_id)[:, None]
        matches = jnp.where(fixed[:, None] | fixed[None], jnp.eye(block, dtype=bool), matches)
        return _walk(matches, _lengths(matches))

    return jax.vmap(of_block)(*flat).reshape(*batch, block)


def _lengths(matches: jax.Array) -> jax.Array:
    """int32 [block + 1, block + 1]: the length of a longest common subsequence of each pair of prefixes."""

    def row(above, match):
        # A match at j lengthens what the prefixes without it have; and a longer prefix has no less.
        longer = jnp.maximum(above[1:], above[:-1] + match)
        now = jnp.pad(jax.lax.cummax(longer), (1, 0))
        return now, now

    none = jnp.zeros(matches.shape[1] + 1, jnp.int32)
    return jnp.concatenate([none[None], jax.lax.scan(row, none, matches.astype(jnp.int32))[1]])


def _walk(matches: jax.Array, lengths: jax.Array) -> jax.Array:
    """int32 [block]: `anchors` of one block, from its matches [block, block] and _lengths."""
    block = matches.shape[0]
    index = jnp.arange(block)

    def step(end, row):  # of the target, the first `end` tokens are left
        i, match, above, length = row
        possible = match & (index < end) & (above[:-1] + 1 == length[end])
        at = jnp.argmin(jnp.where(possible, jnp.abs(index - i), 2 * block))
        found = possible.any()
        return jnp.where(found, at, end), jnp.where(found, at, -1)

    rows = index, matches, lengths[:-1], lengths[1:]
    return jax.lax.scan(step, jnp.asarray(block), rows, reverse=True)[1].astype(jnp.int32)


def _last_before(values: jax.Array, anchor: jax.Array) -> jax.Array:
    """The largest of `values` at anchors before each position; -1 where there is none."""
    largest = jax.lax.cummax(jnp.where(anchor, values, -1), axis=values.ndim - 1)
    return jnp.concatenate([jnp.full_like(largest[..., :1], -1), largest[..., :-1]], axis=-1)
