"""What a denoising pass does with its hidden states: it predicts, accepts and edits tokens, and moves rows on."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig
from llada_jax.model.head import head_matrix
from llada_jax.model.parameters import Params
from llada_jax.sampling import accept, levenshtein
from llada_jax.sampling.predict import Prediction, PredictSettings, predict
from llada_jax.sampling.progress import Step, full_blocks, is_filled, move_on
from llada_jax.sampling.state import EDITING, DecodeSettings, Outcome, Requests, State, WriteLog, Written

PREDICTION = "prediction"  # scope of the head and of what accepts its tokens


@jax.named_scope(PREDICTION)
def denoise(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, hidden: jax.Array, denoising: jax.Array
) -> State:
    """Accepts predictions in the blocks that are `denoising` (bool [rows, slots]); rows whose first blocks need no more
    passes go on to the next ones.

    hidden [rows, slots * block, embed]: of the active blocks, aligned with the tokens they predict.
    """
    rule, size, slots, rows = settings.rule, settings.block_length, settings.slots, len(denoising)
    window = state.start[:, None] + jnp.arange(slots * size)[None]
    # Below, each block is a row of its own: [rows * slots, block].
    view = _with_blocks_as_rows(settings, state)
    canvases = state.tokens, state.written_at, state.confidence
    block = Written(*(_get(canvas, window).reshape(-1, size) for canvas in canvases))
    generated = (window >= state.requests.prompt_length[:, None]).reshape(-1, size)

    def key_of(key, start, step):  # a draw depends on its request, block and step, not on its batch mates
        return jax.random.fold_in(jax.random.fold_in(key, start), step)

    sampling = view.requests.sampling
    sampling = sampling.replace(key=jax.vmap(key_of)(sampling.key, window[:, ::size].reshape(-1), view.step))
    predict_settings = PredictSettings(
        settings.mask_id, settings.sample, settings.cut, entropy=rule == "entropy", raw=rule in ("dinfer", "llada2.2")
    )
    by_block = hidden.reshape(-1, size, hidden.shape[-1])

    def ask(needed, banned=None):
        return predict(head_matrix(params, config), by_block, needed, sampling, predict_settings, banned)

    forced = None if slots == 1 else _forced(state)
    step = levenshtein.step if rule == "llada2.2" else functools.partial(_fill, forced=forced)
    outcome = step(settings, view, block, generated, denoising.reshape(-1), ask)
    state = _put(settings, state, window, outcome)
    shape = rows, slots, size
    generated, left, written = (x.reshape(shape) for x in (generated, outcome.left, outcome.written))
    full, post_steps = (x.reshape(rows, slots) for x in (outcome.full, outcome.post_steps))
    tokens = outcome.block.tokens.reshape(rows, -1)
    after = move_on(
        settings, state, Step(tokens, generated, left, written, full & denoising, post_steps, denoising, forced)
    )
    if outcome.edits is None:
        return after
    moved = after.pending > state.pending
    return after.replace(edits=outcome.edits.replace(original=outcome.edits.original | moved[:, None]))


def _with_blocks_as_rows(settings: DecodeSettings, state: State) -> State:
    """The state with a row for each active block in what is asked of it and what it has taken."""
    if settings.slots == 1:
        requests = state.requests
    else:
        requests = jax.tree.map(lambda x: x[jnp.arange(len(x) * settings.slots) // settings.slots], state.requests)
    steps = {name: getattr(state, name).reshape(-1) for name in ("step", "post_steps", "forced_steps")}
    return state.replace(requests=requests, masked=state.masked.reshape(-1, settings.block_length), **steps)


def _fill(
    settings: DecodeSettings, state: State, block: Written, generated: jax.Array, denoising: jax.Array, ask: Callable,
    forced: jax.Array | None,
) -> Outcome:  # fmt: skip
    """One step of the rules that keep every token in its place; arguments as in levenshtein.step and accepted_by."""
    requests, masked, edits = state.requests, state.masked, settings.rule in EDITING
    needed = (generated if edits else masked) & denoising[:, None]
    prediction = ask(needed)
    accepted = accepted_by(settings, requests, masked, state.forced_steps, prediction, forced) & needed & masked
    edited = jnp.zeros_like(accepted)
    if edits:
        editable, threshold = needed & ~masked, requests.editing_threshold
        edited = accept.edits(prediction.confidence, prediction.token, block.tokens, editable, threshold)
    left, written = masked & ~accepted, accepted | edited
    full, post_steps = full_blocks(settings, state, left, edited)
    values = prediction.token, state.step[:, None], prediction.confidence
    block = Written(*(jnp.where(written, new, old) for new, old in zip(values, block, strict=True)))
    return Outcome(block, left, written, full, post_steps, None)


def _forced(state: State) -> jax.Array:
    """Blocks that must accept something, bool [rows * slots]: a row's first, and those behind a block that is filled
    enough.
    """
    behind = is_filled(state.masked, state.requests.semi_complete_threshold)[:, :-1]
    return jnp.pad(behind, ((0, 0), (1, 0)), constant_values=True).reshape(-1)


def accepted_by(
    settings: DecodeSettings, requests: Requests, masked: jax.Array, step: jax.Array, prediction: Prediction,
    forced: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Returns the masked positions that the rule accepts, bool like masked [rows, block].

    step int32 [rows]: of the schedule. forced bool [rows]: whether something must be accepted; None: in all rows. NaN,
    which weights or activations that are not finite make, is the least sure: decoding ends, and answers show it as
    confidence.
    """
    confidence, entropy = prediction.confidence, prediction.entropy
    confidence = jnp.where(jnp.isnan(confidence), -1.0, confidence)
    entropy = jnp.where(jnp.isnan(entropy), jnp.finfo(jnp.float32).max, entropy)
    due = accept.due(settings.block_length, requests.max_steps, step)
    if forced is not None:
        due *= forced
    match settings.rule:
        case "llada2":
            return accept.llada2(confidence, masked, due, requests.threshold)
        case "llada2.1" | "sglang":  # at least one token a step, no schedule
            return accept.sglang(confidence, masked, requests.threshold, forced)
        case "dinfer":
            return accept.dinfer(confidence, masked, requests.threshold, prediction.mask, forced)
        case "entropy":
            return accept.entropy(entropy, masked, requests.entropy_bound, forced)
        case "fixed":
            return accept.fixed(confidence, masked, due)


def _get(canvas, window):
    return jnp.take_along_axis(canvas, jnp.minimum(window, canvas.shape[1] - 1), axis=1)


def _put(settings: DecodeSettings, state: State, window, outcome: Outcome) -> State:
    """The state with what a pass has made of the blocks at positions `window` [rows, slots * block]."""
    new = Written(*(x.reshape(window.shape) for x in outcome.block))
    if settings.history:
        step = jnp.repeat(state.step, settings.block_length, axis=1)
        written = outcome.written.reshape(window.shape)
        log = _logged(state.log, written, window, new.tokens, new.confidence, step, state.denoising_passes)
        state = state.replace(log=log)

    def put(canvas, part):
        if settings.slots > 1:  # a window that may be longer than what is left of the canvas
            return jax.vmap(lambda row, part, at: row.at[at].set(part, mode="drop"))(canvas, part, window)
        return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at,)))(canvas, part, state.start)

    return state.replace(**{name: put(getattr(state, name), x) for name, x in new._asdict().items()})


def _logged(log: WriteLog, written, window, tokens, confidence, step, forward) -> WriteLog:
    """Appends what a pass has written: arrays [rows, positions], forward [rows]. What is too much is only counted."""
    capacity = log.token.shape[1]
    place = log.count[:, None] + jnp.cumsum(written, axis=1) - 1
    place = jnp.where(written, place, capacity)  # out of bounds: dropped
    forward = jnp.broadcast_to(forward[:, None], written.shape)
    new = dict(position=window, token=tokens, step=step, forward=forward, confidence=confidence)
    append = jax.vmap(lambda row, part, at: row.at[at].set(part, mode="drop"))
    new = {name: append(getattr(log, name), x, place) for name, x in new.items()}
    return WriteLog(count=log.count + written.sum(axis=1), **new)
