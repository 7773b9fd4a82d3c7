"""Block-by-block decoding on the device: one `lax.while_loop`, each row at its own block and its own step.

An iteration is one forward pass over a window of every row, against the cached keys and values of the row's finished
blocks. A block that has just been finished is committed: its keys and values are computed from its final tokens, in one
of two ways.

    separate   the row's window is the finished block; the row denoises nothing in this iteration
    fused      all windows have two blocks; the first step of the next block also commits the finished one

Both are exact, because clean tokens see clean blocks only. The share of rows with a block to commit decides which one
an iteration takes (State.fuse_share): a single row's commits are fused unless fuse_share is above 1.
"""

import functools

import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.attention.decoding.cache_write import write_blocks
from llada_jax.attention.decoding.cached import CACHE_AXES
from llada_jax.attention.visibility import block_window, two_block_window
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Cache, Execution, hidden_states
from llada_jax.model.head import head_matrix
from llada_jax.model.parameters import Params, join_heads
from llada_jax.runtime.xla_options import xla_options
from llada_jax.sampling import accept, levenshtein
from llada_jax.sampling.predict import PredictSettings, predict
from llada_jax.sampling.prefill import prefill_chunk, prefill_long, prefill_whole
from llada_jax.sampling.state import EDITING, BlockEdits, DecodeSettings, Outcome, Requests, State, Written, empty_state

PREDICTION = "prediction"  # scope of the head and of what accepts its tokens


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
    zeros, no = jnp.zeros_like(start), jnp.zeros(start.shape, bool)
    masked = start[:, None] + jnp.arange(block)[None] >= requests.prompt_length[:, None]
    new = dict(
        requests=requests, tokens=jnp.where(inside, prompts, settings.mask_id), written_at=jnp.zeros_like(prompts),
        confidence=jnp.zeros(prompts.shape), masked=masked, start=start, step=zeros, post_steps=zeros, pending=no,
        finished=start > prefill_length, denoising_passes=zeros, commit_passes=zeros, positions_evaluated=zeros,
        last_hidden=last_hidden,
    )  # fmt: skip
    if state.edits is not None:
        new["edits"] = BlockEdits(masked, jnp.zeros((len(rows), *state.edits.seen.shape[1:]), jnp.uint32))
    old = {name: getattr(state, name) for name in new}
    return state.replace(cache=cache, **jax.tree.map(lambda a, b: a.at[rows].set(b, mode="drop"), old, new))


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
    block = settings.block_length
    running = ~state.finished
    committing = running & state.pending
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

    denoising = running & (fused | ~state.pending)
    if config.alignment == "shifted":
        hidden = jnp.concatenate([last_hidden[:, None], hidden[:, :-1]], axis=1)
    width = jnp.where(fused, 2 * block, block)
    state = state.replace(
        cache=constrain_cache(cache),
        last_hidden=last_hidden,
        pending=state.pending & ~committing,
        commit_passes=state.commit_passes + (committing & ~fused),
        positions_evaluated=state.positions_evaluated + running * width,
        iterations=state.iterations + 1,
        busy=state.busy + running.sum(),
        batch_positions=state.batch_positions + running.size * width,
    )
    return _denoise(params, config, settings, state, hidden, denoising)


def constrain_cache(cache: Cache) -> Cache:
    return jax.tree.map(lambda x: sharding.constrain(x, CACHE_AXES), cache)


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
        first = jnp.where(state.pending, state.start - block, state.start)
        visibility = block_window(first, block)
    else:
        first = state.start - block
        visibility = two_block_window(state.start, block, ~state.pending)
    window = jnp.clip(first[:, None] + jnp.arange(blocks * block)[None], 0, canvas - 1)
    tokens = jnp.take_along_axis(state.tokens, window, axis=1)
    hidden, computed = hidden_states(params, config, tokens, window, visibility, settings.execution, cache=state.cache)
    return hidden[:, -block:], jax.tree.map(lambda x: x[:, :, :, :block], computed), hidden[:, block - 1]


@jax.named_scope(PREDICTION)
def _denoise(params, config, settings, state: State, hidden, denoising) -> State:
    """Accepts predictions in the rows that are `denoising` (bool [rows]); rows with a full block go to the next one."""
    rule, requests, size = settings.rule, state.requests, settings.block_length
    window = state.start[:, None] + jnp.arange(size)[None]
    block = Written(*(_get(canvas, window) for canvas in (state.tokens, state.written_at, state.confidence)))
    generated = window >= requests.prompt_length[:, None]

    def key_of(key, start, step):  # a draw depends on its request, block and step, not on its batch mates
        return jax.random.fold_in(jax.random.fold_in(key, start), step)

    sampling = requests.sampling
    sampling = sampling.replace(key=jax.vmap(key_of)(sampling.key, state.start, state.step))
    predict_settings = PredictSettings(
        settings.mask_id, settings.sample, settings.cut, entropy=rule == "entropy", raw=rule in ("dinfer", "llada2.2")
    )

    def ask(needed, banned=None):
        return predict(head_matrix(params, config), hidden, needed, sampling, predict_settings, banned)

    step = levenshtein.step if rule == "llada2.2" else _fill
    outcome = step(settings, state, block, generated, denoising, ask)
    full = outcome.full & denoising
    ended = _ended(settings, requests, generated, outcome.block.tokens, outcome.left, outcome.written, full)
    finished = state.finished | ended | (full & (state.start + size >= requests.row_end))

    moves = full & ~finished
    edits = outcome.edits
    return state.replace(
        tokens=_put(state.tokens, outcome.block.tokens, state.start),
        written_at=_put(state.written_at, outcome.block.written_at, state.start),
        confidence=_put(state.confidence, outcome.block.confidence, state.start),
        masked=outcome.left | moves[:, None],
        start=jnp.where(moves, state.start + size, state.start),
        step=jnp.where(moves, 0, state.step + denoising),
        post_steps=jnp.where(moves, 0, jnp.where(denoising, outcome.post_steps, state.post_steps)),
        pending=state.pending | moves,
        finished=finished,
        denoising_passes=state.denoising_passes + denoising,
        edits=edits and edits.replace(original=edits.original | moves[:, None]),
    )


def _fill(settings, state: State, block: Written, generated, denoising, ask) -> Outcome:
    """One step of the rules that keep every token in its place; arguments as in levenshtein.step."""
    requests, masked = state.requests, state.masked
    needed = (generated if settings.rule in EDITING else masked) & denoising[:, None]
    prediction = ask(needed)
    accepted = _accept(settings, state, prediction) & needed & masked
    edited = jnp.zeros_like(accepted)
    if settings.rule in EDITING:
        editable, threshold = needed & ~masked, requests.editing_threshold
        edited = accept.edits(prediction.confidence, prediction.token, block.tokens, editable, threshold)
    left, written = masked & ~accepted, accepted | edited
    full, post_steps = _progress(settings, state, left, edited)
    values = prediction.token, state.step[:, None], prediction.confidence
    block = Written(*(jnp.where(written, new, old) for new, old in zip(values, block, strict=True)))
    return Outcome(block, left, written, full, post_steps, None)


def _get(canvas, window):
    return jnp.take_along_axis(canvas, jnp.minimum(window, canvas.shape[1] - 1), axis=1)


def _put(canvas, block, start):
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at,)))(canvas, block, start)


def _accept(settings: DecodeSettings, state: State, prediction) -> jax.Array:
    """Returns the masked positions that the rule accepts, bool [rows, block]."""
    requests, masked, confidence = state.requests, state.masked, prediction.confidence
    due = accept.due(settings.block_length, requests.max_steps, state.step)
    match settings.rule:
        case "llada2":
            return accept.llada2(confidence, masked, due, requests.threshold)
        case "llada2.1" | "sglang":  # at least one token a step, no schedule
            return accept.sglang(confidence, masked, requests.threshold)
        case "dinfer":
            return accept.dinfer(confidence, masked, requests.threshold, prediction.mask)
        case "entropy":
            return accept.entropy(prediction.entropy, masked, requests.entropy_bound)
        case "fixed":
            return accept.fixed(confidence, masked, due)


def _progress(settings, state: State, left, edited):
    """(full: the block needs no more steps, post_steps), [rows], after a denoising step of each row."""
    if settings.rule not in EDITING:
        return ~left.any(-1), state.post_steps
    was_full = ~state.masked.any(-1)
    # LLaDA2.1: a full block is edited until a pass changes nothing, or max_post_steps are spent.
    post_steps = state.post_steps + was_full
    settled = was_full & ~edited.any(-1)
    spent = ~left.any(-1) & (post_steps + 1 > state.requests.max_post_steps)
    return settled | spent, post_steps


def _ended(settings, requests: Requests, generated, tokens, left, written, full) -> jax.Array:
    """Returns bool [rows]: rows that stop at an end of sequence in the current block, as the rule has it.

    Earlier blocks hold none, or the row would have stopped there.
    """
    ends = generated & ~left & (tokens[:, :, None] == requests.eos_ids[:, None]).any(-1)
    between_blocks = full & ends.any(-1)
    if settings.rule in EDITING:  # as their references, only when asked to
        return between_blocks & requests.eos_early_stop
    first_end = jnp.argmax(ends, axis=-1)
    gap = (left & (jnp.arange(left.shape[1])[None] < first_end[:, None])).any(-1)
    inside = ends.any(-1) & ~gap
    if settings.rule == "llada2":  # as its reference, looked at only in a step that writes an end of sequence
        inside &= (written & ends).any(-1)
    return between_blocks | (inside & requests.eos_early_stop)
