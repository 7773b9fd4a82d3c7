"""How far a row is after a denoising pass: which blocks need no more, where it ends, which blocks it works on next.

A row works on its active blocks, which follow one another from State.start on. The leading ones that need no more
passes are left behind, to be committed. One more block is activated after a pass whose last active block has enough
written in it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.sampling.state import EDITING, DecodeSettings, State

_ROUNDING = 1e-3  # of a position, in counts that are compared with a share


class Step(NamedTuple):
    """What a pass has done to the active blocks. tokens [rows, slots * block] int32; generated, left (still masked),
    written bool [rows, slots, block]; full (of full_blocks), denoising bool, post_steps int32 [rows, slots]; forced
    bool [rows * slots], None: all.
    """

    tokens: jax.Array
    generated: jax.Array
    left: jax.Array
    written: jax.Array
    full: jax.Array
    post_steps: jax.Array
    denoising: jax.Array
    forced: jax.Array | None


def is_filled(masked: jax.Array, share: jax.Array) -> jax.Array:
    """Which blocks have at least `share` [rows] of their positions written, bool [rows, slots].

    masked bool [rows, slots, block]. Prompt tokens count as written.
    """
    block = masked.shape[2]
    return (~masked).sum(-1) >= share[:, None] * block - _ROUNDING


def move_on(settings: DecodeSettings, state: State, done: Step) -> State:
    """The state after a pass, whose tokens are in it already."""
    block, slots = settings.block_length, settings.slots
    lead = jnp.cumprod(done.full, axis=1).sum(axis=1)  # blocks that are left behind
    ended, ends, first_end = _ended(settings, state, done, lead)
    behind = state.start + lead * block
    finished = state.finished | ended | ((lead > 0) & (behind >= state.requests.row_end))
    moves = (lead > 0) & ~finished
    start = jnp.where(moves, behind, state.start)
    forced_steps = state.step + 1
    if slots > 1:
        last = jnp.where(ended, first_end // block, jnp.maximum(lead - 1, 0))  # block of the answer
        start = jnp.where(finished & ~state.finished, state.start + last * block, start)
        forced_steps = state.forced_steps + done.forced.reshape(-1, slots)
        active = _activate(settings, state, done, jnp.where(moves, lead, 0), start, ends)
        state = state.replace(active=jnp.where(finished, state.active, active))
    by = jnp.where(moves, lead, 0)

    def after(old, new):
        return _shifted(jnp.where(done.denoising, new, old), by, 0)

    return state.replace(
        masked=_shifted(done.left, by, True),
        start=start,
        step=after(state.step, state.step + 1),
        post_steps=after(state.post_steps, done.post_steps),
        forced_steps=after(state.forced_steps, forced_steps),
        pending=state.pending + by,
        finished=finished,
        denoising_passes=state.denoising_passes + done.denoising.any(axis=1),
    )


def full_blocks(settings: DecodeSettings, state: State, left: jax.Array, edited: jax.Array):
    """(blocks that need no more passes if those before them need none, bool, and post_steps), each [rows * slots].

    state: with blocks as rows (sampling/denoise.py), before the pass; left, edited bool [rows * slots, block].
    """
    filled = ~left.any(-1)
    if settings.rule not in EDITING:
        return filled, state.post_steps
    # LLaDA2.1: a full block is edited until a pass changes nothing, or max_post_steps are spent. The blocks behind the
    # first are edited as long as it changes, and spend none.
    was_full = ~state.masked.any(-1)
    first = jnp.arange(len(was_full)) % settings.slots == 0
    post_steps = state.post_steps + (was_full & first)
    settled = was_full & ~edited.any(-1)
    return filled & (settled | (post_steps + 1 > state.requests.max_post_steps)), post_steps


def _ended(settings: DecodeSettings, state: State, done: Step, lead):
    """(rows that stop at an end of sequence, as the rule has it, bool [rows]; ends that are written, bool [rows, slots
    * block]; the first of them, int32 [rows]).

    Earlier blocks hold none, or the row would have stopped there.
    """
    requests, rows = state.requests, len(lead)
    left, generated, written = (x.reshape(rows, -1) for x in (done.left, done.generated, done.written))
    ends = generated & ~left & (done.tokens[:, :, None] == requests.eos_ids[:, None]).any(-1)
    first_end = jnp.argmax(ends, axis=-1)
    position = jnp.arange(left.shape[1])[None]
    between_blocks = (ends & (position < lead[:, None] * settings.block_length)).any(-1)
    if settings.rule in EDITING:  # as their references, only when asked to
        return between_blocks & requests.eos_early_stop, ends, first_end
    gap = (left & (position < first_end[:, None])).any(-1)
    inside = ends.any(-1) & ~gap
    if settings.rule == "llada2":  # as its reference, looked at only in a step that writes an end of sequence
        looked_at = (written & ends).any(-1)
        inside &= looked_at if settings.slots == 1 else looked_at | (lead > 0)  # or that has filled what is before it
    return between_blocks | (inside & requests.eos_early_stop), ends, first_end


def _activate(settings: DecodeSettings, state: State, done: Step, by, start, ends) -> jax.Array:
    """Returns how many blocks are active next, int32 [rows]; `by` blocks have been left behind.

    One more than remain where the last one has enough written, where the row may have one more, and where no end of
    sequence is written that will stop it before.
    """
    requests, remaining = state.requests, state.active - by
    enough = is_filled(done.left, requests.add_block_threshold)
    enough = jnp.take_along_axis(enough, state.active[:, None] - 1, axis=1)[:, 0]
    fits = (remaining < requests.active_blocks) & (start + remaining * settings.block_length < requests.row_end)
    stops = requests.eos_early_stop if settings.rule in EDITING else True
    more = enough & fits & ~(ends.any(-1) & stops)
    return remaining + ((remaining == 0) | more)


def _shifted(x, by, fill):
    """x [rows, slots, ...] without its first `by` [rows] slots, and as many of `fill` behind it."""
    shifted, slots = x, x.shape[1]
    for n in range(1, slots + 1):
        moved = jnp.concatenate([x[:, n:], jnp.full_like(x[:, :n], fill)], axis=1)
        shifted = jnp.where(by.reshape(-1, *[1] * (x.ndim - 1)) == n, moved, shifted)
    return shifted
