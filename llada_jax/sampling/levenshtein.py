"""LLaDA2.2's editing of a block in decoding: predictions that delete a position or insert one (Levenshtein editing).

Two token ids stand for edits. A written DELETE drops its position. A written INSERT (SPLIT in the released code) is
replaced by the mask and, behind it, the token that stood there before. What follows moves, and the block keeps its
length: masks fill its end, or its last tokens are cut off.

Followed is the description of `_joint_decode_block` in LLaDA2.2's Hugging Face code. Ours are, where that code draws at
random, loops or breaks off:

    loops     a position to predict anew is not drawn: it is the least sure one (`escape`)
    states    are compared by 64 bits of a hash, not token by token
    the cap   on steps makes the step a final round: no mask is left, as it could be there
    prompts   never move, and the ids of edits in them stay as they are: there they are consumed
    the mask  is never written (sampling/predict.py)

With a temperature, tokens are drawn and confidence stays that of softmax(logits), without temperature or cuts. Whether
the released code draws edits too, as is done here, its description does not say.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.sampling import accept
from llada_jax.sampling.predict import Prediction
from llada_jax.sampling.state import BlockEdits, DecodeSettings, Outcome, Requests, State, Written

TRIES = 5  # positions that are predicted anew, at most, when a block would repeat itself


class EditIds(NamedTuple):
    """Token ids, static."""

    mask: int
    delete: int
    insert: int


class Edited(NamedTuple):
    """A block after its edits, each [..., block]: tokens int32; original bool: masks that no edit has made; source
    int32: the index that a position had before, -1 for masks that the edits made.
    """

    tokens: jax.Array
    original: jax.Array
    source: jax.Array


def apply_edits(written: jax.Array, before: jax.Array, original: jax.Array, fixed: jax.Array, ids: EditIds) -> Edited:
    """Carries out the DELETEs and INSERTs in a block.

    written, before [..., block] int32: the block with and without what this step wrote. original, fixed [..., block]
    bool: masks that no edit has made; positions of the prompt, which come first and stay whatever their token is.
    """
    delete, insert = (~fixed & (written == token) for token in (ids.delete, ids.insert))
    count = jnp.where(delete, 0, jnp.where(insert, 2, 1))
    end = jnp.cumsum(count, axis=-1)
    block = written.shape[-1]
    place = jnp.arange(block)
    # The position that fills a place is the first that ends behind it.
    source = jnp.sum(end[..., None, :] <= jnp.broadcast_to(place, end.shape)[..., None], axis=-1)
    padding = source >= block
    source = jnp.minimum(source, block - 1)

    def at(values):
        return jnp.take_along_axis(values, source, axis=-1)

    inserted = at(insert) & (at(end - count) == jnp.broadcast_to(place, end.shape))
    new = padding | inserted
    kept = jnp.where(at(insert), at(before), at(written))
    return Edited(jnp.where(new, ids.mask, kept), ~new & at(original & ~fixed), jnp.where(new, -1, source))


def moved(values: jax.Array, source: jax.Array) -> jax.Array:
    """values [..., block] of the positions before an edit, at their places after it; 0 at new masks."""
    return jnp.where(source >= 0, jnp.take_along_axis(values, jnp.maximum(source, 0), axis=-1), 0)


# --- what a step writes ---------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Of a step: write bool [rows, block]; final bool [rows]: it must leave a whole block without edits; post_steps
    int32 [rows]: steps in a row, this one among them, that began without an original mask.
    """

    write: jax.Array
    final: jax.Array
    post_steps: jax.Array


def choose(
    confidence: jax.Array, predicted: jax.Array, current: jax.Array, masked: jax.Array, original: jax.Array,
    generated: jax.Array, step: jax.Array, post_steps: jax.Array, requests: Requests,
) -> Choice:  # fmt: skip
    """Which predictions a step writes, edits among them.

    requests: max_steps (`steps`), threshold, editing_threshold, max_post_steps and max_steps_per_block are read.

    Masks: all with confidence > threshold if they are as many as are due, else the surest that are due; all of them
    once `steps` are over. Due are the block's masks at its beginning, spread over `steps`, and one for every mask that
    an edit made. Tokens: where the prediction differs with confidence > editing_threshold. A round is final when
    post_steps reaches max_post_steps (with 0 of them: when it writes the last original mask), and at the last step
    allowed.

    [rows, block]: confidence float32, predicted and current int32, masked, original and generated bool. [rows] int32:
    step, post_steps before this step.
    """
    unwritten = masked & original
    left, new = unwritten.sum(-1), (masked & ~original).sum(-1)
    post_steps = jnp.where(left > 0, 0, post_steps + 1)
    due = accept.due(generated.sum(-1), requests.max_steps, step) + new
    fill = accept.llada2(confidence, masked, due, requests.threshold)
    fill = jnp.where((step >= requests.max_steps)[:, None], masked, fill)
    edit = accept.edits(confidence, predicted, current, generated & ~masked, requests.editing_threshold)
    completes = (left > 0) & ~(unwritten & ~fill).any(-1)
    final = jnp.where(requests.max_post_steps > 0, post_steps >= requests.max_post_steps, completes)
    final |= step >= requests.max_steps_per_block - 1
    return Choice(jnp.where(final[:, None], masked, fill) | edit, final, post_steps)


# --- blocks that repeat themselves ----------------------------------------------------------------------------------


def fingerprint(tokens: jax.Array) -> jax.Array:
    """uint32 [rows, 2]: a hash of tokens [rows, block] int32."""
    place = jnp.arange(tokens.shape[-1], dtype=jnp.uint32)[None]

    def half(seed):
        at = _mix(place * jnp.uint32(0x9E3779B9) + jnp.uint32(seed))
        return jnp.sum(_mix(_mix(tokens.astype(jnp.uint32) ^ jnp.uint32(seed)) + at), axis=-1, dtype=jnp.uint32)

    return jnp.stack([half(0x243F6A88), half(0x85A308D3)], axis=-1)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def is_seen(tokens: jax.Array, seen: jax.Array, step: jax.Array) -> jax.Array:
    """bool [rows]: whether an earlier step of the block wrote these tokens [rows, block]. seen as in `remember`."""
    known = jnp.arange(seen.shape[-1])[None] < step[:, None]
    return (known & (seen == fingerprint(tokens)[:, :, None]).all(axis=1)).any(axis=-1)


def remember(tokens: jax.Array, seen: jax.Array, step: jax.Array) -> jax.Array:
    """Notes the tokens that step `step` [rows] of a block wrote. seen: uint32 [rows, 2, most steps], the fingerprint
    of each step.
    """
    now = jnp.arange(seen.shape[-1])[None, None] == step[:, None, None]
    return jnp.where(now, fingerprint(tokens)[:, :, None], seen)


def escape(
    first: jax.Array, second: jax.Array, confidence: jax.Array, current: jax.Array, repeats: Callable
) -> jax.Array:
    """Leaves a loop: exchanges predictions until the block is new, at most TRIES times. Returns bool [rows, block]: the
    positions that take their second choice.

    A try exchanges the first for the second choice, or back, at the least sure of the positions that now change and
    that no try had yet; once all had one, they begin anew. The reference draws one of those that change. The two agree
    where one position changes.

    first [rows, block] int32: the block with its predictions, current: without. second: the next best ones, read where
    `first` changes a token. confidence [rows, block] float32, of the first. repeats: (tokens) -> bool [rows].
    """
    places = jnp.arange(first.shape[-1])[None]

    def one_try(_, carry):
        exchanged, tried = carry
        tokens = jnp.where(exchanged, second, first)
        changes = tokens != current
        untried = (changes & ~tried).any(-1, keepdims=True)
        tried &= untried
        at = jnp.argmin(jnp.where(changes & ~tried, confidence, jnp.inf), axis=-1)
        here = (places == at[:, None]) & (repeats(tokens) & changes.any(-1))[:, None]
        return exchanged ^ here, tried | here

    nowhere = jnp.zeros(first.shape, bool)
    return jax.lax.fori_loop(0, TRIES, one_try, (nowhere, nowhere))[0]


# --- a step ---------------------------------------------------------------------------------------------------------


def step(
    settings: DecodeSettings, state: State, block: Written, generated: jax.Array, denoising: jax.Array, ask: Callable
) -> Outcome:
    """One step of rule "llada2.2" in the rows that are `denoising` [rows]; the others stay as they are.

    block: the current one of each row. generated [rows, block] bool: not of the prompt. ask: (needed [rows, block],
    banned as in predict.predict) -> Prediction.
    """
    edits, masked = state.edits, state.masked
    ids = EditIds(settings.mask_id, settings.delete_id, settings.insert_id)
    prediction = ask(generated & denoising[:, None], None)
    chosen = choose(
        prediction.confidence, prediction.token, block.tokens, masked, edits.original, generated, state.step,
        state.post_steps, state.requests,
    )  # fmt: skip
    first = jnp.where(chosen.write & denoising[:, None], prediction.token, block.tokens)
    repeats = functools.partial(is_seen, seen=edits.seen, step=state.step)
    tokens, confidence = _second_thoughts(prediction, first, block.tokens, chosen.final, ids, repeats, ask)
    seen = jnp.where(denoising[:, None, None], remember(tokens, edits.seen, state.step), edits.seen)

    written = (tokens != block.tokens) & (tokens != ids.delete) & (tokens != ids.insert)
    edited = apply_edits(tokens, block.tokens, edits.original, ~generated, ids)
    left = generated & (edited.tokens == ids.mask)
    settled = ~left.any(-1) & (edited.tokens == block.tokens).all(-1)
    return Outcome(
        Written(
            edited.tokens,
            moved(jnp.where(written, state.step[:, None], block.written_at), edited.source),
            moved(jnp.where(written, confidence, block.confidence), edited.source),
        ),
        left=left,
        written=moved(written, edited.source) > 0,
        full=settled | chosen.final,
        post_steps=chosen.post_steps,
        edits=BlockEdits(edited.original, seen),
    )


def _second_thoughts(
    prediction: Prediction, first: jax.Array, current: jax.Array, final: jax.Array, ids: EditIds, repeats, ask
) -> tuple[jax.Array, jax.Array]:
    """(tokens, confidence) of a block whose predictions are written in `first`: with the best other token for edits in
    a final round, and with some second choices where the block would repeat itself.

    The head runs again for these positions, in steps that have some.
    """
    scrubbed = final[:, None] & (first != current) & ((first == ids.delete) | (first == ids.insert))
    loops = ~final & repeats(first)
    again = scrubbed | (loops[:, None] & (first != current))

    def ask_again():
        edit = jnp.array([[[ids.delete, ids.insert]]], jnp.int32)
        other = ask(again, jnp.where(final[:, None, None], edit, prediction.token[..., None]))
        exchanged = escape(first, other.token, prediction.confidence, current, repeats)
        exchanged = scrubbed | (exchanged & loops[:, None])
        confidence = jnp.where(exchanged, other.confidence, prediction.confidence)
        return jnp.where(exchanged, other.token, first), confidence

    return jax.lax.cond(again.any(), ask_again, lambda: (first, prediction.confidence))
