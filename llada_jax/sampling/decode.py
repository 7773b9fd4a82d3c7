"""Block-by-block decoding on the device: one `lax.while_loop`, each row at its own block and its own step.

An iteration is one forward pass over a window of every row, against the cached keys and values of the row's finished
blocks. A block that has just been finished is committed: its keys and values are computed from its final tokens, in one
of two ways.

    separate   the row's window is the finished block; the row denoises nothing in this iteration
    fused      all windows have two blocks; the first step of the next block also commits the finished one

Both are exact, because clean tokens see clean blocks only. The share of rows with a block to commit decides which one
an iteration takes (State.fuse_share): a single row's commits are fused unless fuse_share is above 1. Where rows may
work on several blocks at once, windows are those of several_blocks.py, and all commits are fused.
"""

import functools

import jax
import jax.numpy as jnp

from llada_jax.attention.decoding.cache_write import write_blocks
from llada_jax.attention.visibility import block_window, two_block_window
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Cache, Execution, hidden_states
from llada_jax.model.parameters import Params, join_heads
from llada_jax.runtime.xla_options import xla_options
from llada_jax.sampling import several_blocks
from llada_jax.sampling.denoise import denoise
from llada_jax.sampling.prefill import prefill_chunk, prefill_long, prefill_whole
from llada_jax.sampling.state import BlockEdits, DecodeSettings, Requests, State, constrain_cache, empty_state


def _compiled(**options):
    """jax.jit with XLA's options for the platform, which is not looked at before the first call."""

    def wrap(function):
        @functools.cache
        def jitted():
            return jax.jit(function, compiler_options=xla_options(jax.default_backend()) or None, **options)

        return functools.wraps(function)(lambda *args, **kwargs: jitted()(*args, **kwargs))

    return wrap


@_compiled(static_argnames=("config", "settings", "prefill_length"))
def decode(
    params: Params,
    config: ModelConfig,
    settings: DecodeSettings,
    requests: Requests,
    prompts: jax.Array,
    fuse_share: float,
    prefill_length: int,
) -> State:
    """Decodes a whole batch to its end in one program. prompts [rows, canvas] int32; other arguments as in `admit`."""
    dtype = settings.execution.dtype or params["embedding"].dtype
    params = loop_weights(params, config, settings.execution)
    state = empty_state(config, settings, *prompts.shape, dtype, fuse_share)
    long = prefill_length > settings.prefill_chunk
    at_once, rows = 0 if long else prefill_length, jnp.arange(prompts.shape[0])
    state = _admit(params, config, settings, state, rows, requests, prompts, at_once)
    if long:
        fill = functools.partial(prefill_chunk, params, config, settings)
        state = prefill_long(fill, state, settings.prefill_chunk)
    return _advance(params, config, settings, state, jnp.iinfo(jnp.int32).max)


_joined = jax.jit(join_heads, static_argnames=("config",))


def loop_weights(params: Params, config: ModelConfig, execution: Execution) -> Params:
    """The weights as passes of decoding read them fastest: on TPUs with joined heads. To be made once."""
    return _joined(params, config) if execution.attention == "kernel" else params


def _advance(params, config: ModelConfig, settings: DecodeSettings, state: State, iterations) -> State:
    none = jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(
        lambda state: ~state.finished.all() & (state.iterations < iterations),
        functools.partial(iterate, params, config, settings),
        state.replace(iterations=none, busy=none, batch_positions=none),
    )


def _admit(params, config, settings, state: State, rows, requests, prompts, prefill_length: int) -> State:
    block, canvas = settings.block_length, state.tokens.shape[1]
    inside = jnp.arange(canvas)[None] < requests.prompt_length[:, None]
    start = requests.prompt_length // block * block
    cache, last_hidden = state.cache, jnp.zeros((len(rows), state.last_hidden.shape[1]), state.last_hidden.dtype)
    if prefill_length:
        hidden, computed = prefill_whole(params, config, prompts[:, :prefill_length], block, settings.execution)

        def put(whole, part):
            place = whole.at[:, rows, :, :prefill_length, : part.shape[-1]]
            return place.set(part.astype(whole.dtype), mode="drop")

        cache = jax.tree.map(put, cache, computed)
        previous = jnp.maximum(start - 1, 0)[:, None, None]
        last_hidden = jnp.take_along_axis(hidden, previous, axis=1)[:, 0].astype(last_hidden.dtype)
        last_hidden = jnp.where(start[:, None] > 0, last_hidden, 0)  # nothing precedes the first token
    zeros, slots = jnp.zeros_like(start), jnp.zeros((len(rows), settings.slots), jnp.int32)
    masked = start[:, None] + jnp.arange(settings.slots * block)[None] >= requests.prompt_length[:, None]
    masked = masked.reshape(-1, settings.slots, block)
    new = dict(
        requests=requests, tokens=jnp.where(inside, prompts, settings.mask_id), written_at=jnp.zeros_like(prompts),
        confidence=jnp.zeros(prompts.shape), masked=masked, start=start, step=slots, post_steps=slots,
        forced_steps=slots, active=zeros + 1, pending=zeros, finished=start > prefill_length, denoising_passes=zeros,
        commit_passes=zeros, positions_evaluated=zeros,
        last_hidden=last_hidden,
    )  # fmt: skip
    if state.edits is not None:
        new["edits"] = BlockEdits(masked[:, 0], jnp.zeros((len(rows), *state.edits.seen.shape[1:]), jnp.uint32))
    old = {name: getattr(state, name) for name in new}
    log = state.log.replace(count=state.log.count.at[rows].set(0, mode="drop"))
    return state.replace(cache=cache, log=log, **jax.tree.map(lambda a, b: a.at[rows].set(b, mode="drop"), old, new))


@_compiled(static_argnames=("config", "settings", "prefill_length"), donate_argnames=("state",))
def admit(
    params: Params,
    config: ModelConfig,
    settings: DecodeSettings,
    state: State,
    rows: jax.Array,
    requests: Requests,
    prompts: jax.Array,
    prefill_length: int,
) -> State:
    """Puts requests into `rows` [n] of a state (out of bounds: dropped) and prefills them. Donates the state.

    requests: Requests with arrays [n]. prompts [n, canvas] int32: anything may follow each prompt. prefill_length
    (static): tokens in whole blocks of the longest prompt, computed in one block-causal pass. Prompts with more wait,
    as rows that are finished, until `fill` has computed them. The tail of a prompt is part of its first decoded block.
    """
    return _admit(params, config, settings, state, rows, requests, prompts, prefill_length)


@_compiled(static_argnames=("config", "settings"), donate_argnames=("state",))
def fill(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, rows: jax.Array, first: jax.Array
) -> State:
    """prefill.prefill_chunk, compiled. Donates the state."""
    return prefill_chunk(params, config, settings, state, rows, first)


@_compiled(static_argnames=("config", "settings"), donate_argnames=("state",))
def advance(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, iterations: jax.Array
) -> State:
    """Runs at most `iterations` (int32) passes over the batch, fewer if every row finishes. Donates the state.

    Afterwards the state's iterations, busy and batch_positions count this call alone.
    """
    return _advance(params, config, settings, state, iterations)


def iterate(params: Params, config: ModelConfig, settings: DecodeSettings, state: State) -> State:
    """One decoding step of the whole batch: a forward pass, then commits, acceptance and moves to the next block.

    Pure, and can be lowered from abstract arguments (state.empty_state).
    """
    if settings.slots > 1:
        return several_blocks.iterate(params, config, settings, state)
    block = settings.block_length
    running, pending = ~state.finished, state.pending > 0
    committing = running & pending
    fused = committing.any() & (committing.sum() >= state.fuse_share * running.sum())
    passes = [functools.partial(window_pass, params, config, settings, state, blocks) for blocks in (1, 2)]
    hidden, computed, last_hidden = jax.lax.cond(fused, passes[1], passes[0])

    execution = settings.execution
    write = functools.partial(
        write_blocks, at=state.start - block, selected=committing, kernel=execution.attention == "kernel",
        interpret=execution.interpret,
    )  # fmt: skip
    cache = jax.tree.map(write, state.cache, computed)
    last_hidden = jnp.where(committing[:, None], last_hidden, state.last_hidden)

    denoising = running & (fused | ~pending)
    if config.alignment == "shifted":
        hidden = jnp.concatenate([last_hidden[:, None], hidden[:, :-1]], axis=1)
    width = jnp.where(fused, 2 * block, block)
    state = state.replace(
        cache=constrain_cache(cache),
        last_hidden=last_hidden,
        pending=jnp.where(committing, 0, state.pending),
        commit_passes=state.commit_passes + (committing & ~fused),
        positions_evaluated=state.positions_evaluated + running * width,
        iterations=state.iterations + 1,
        busy=state.busy + running.sum(),
        batch_positions=state.batch_positions + running.size * width,
    )
    return denoise(params, config, settings, state, hidden, denoising[:, None])


def window_pass(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, blocks: int
) -> tuple[jax.Array, Cache, jax.Array]:
    """Forward pass over a window of one or two blocks per row.

    Returns hidden states [rows, block, embed] of the window's last block, the keys and values of its first block, and
    the hidden state [rows, embed] of the last token of its first block.
    """
    block = settings.block_length
    canvas = state.tokens.shape[1]
    if blocks == 1:
        first = jnp.where(state.pending > 0, state.start - block, state.start)
        visibility = block_window(first, block)
    else:
        first = state.start - block
        visibility = two_block_window(state.start, block, state.pending == 0)
    window = jnp.clip(first[:, None] + jnp.arange(blocks * block)[None], 0, canvas - 1)
    tokens = jnp.take_along_axis(state.tokens, window, axis=1)
    hidden, computed = hidden_states(params, config, tokens, window, visibility, settings.execution, cache=state.cache)
    return hidden[:, -block:], jax.tree.map(lambda x: x[:, :, :, :block], computed), hidden[:, block - 1]
