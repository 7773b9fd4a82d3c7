"""What a denoising pass does with its hidden states: it predicts, accepts and edits tokens, and moves rows on."""

import functools

import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig
from llada_jax.model.head import head_matrix
from llada_jax.model.parameters import Params
from llada_jax.sampling import accept
from llada_jax.sampling.predict import Prediction, PredictSettings, predict
from llada_jax.sampling.progress import Step, is_filled, move_on
from llada_jax.sampling.state import DecodeSettings, Requests, State, WriteLog

PREDICTION = "prediction"  # scope of the head and of what accepts its tokens


@jax.named_scope(PREDICTION)
def denoise(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, hidden: jax.Array, denoising: jax.Array
) -> State:
    """Accepts predictions in the blocks that are `denoising` (bool [rows, slots]); rows whose first blocks need no more
    passes go on to the next ones.

    hidden [rows, slots * block, embed]: of the active blocks, aligned with the tokens they predict.
    """
    rule, block, slots, rows = settings.rule, settings.block_length, settings.slots, len(denoising)
    requests = state.requests
    window = state.start[:, None] + jnp.arange(slots * block)[None]
    # Below, each block is a row of its own: [rows * slots, block].
    asked, step, masked = _of_blocks(requests, slots), state.step.reshape(-1), state.masked.reshape(-1, block)
    old = _get(state.tokens, window).reshape(-1, block)
    generated = (window >= requests.prompt_length[:, None]).reshape(-1, block)
    needed = (generated if rule == "llada2.1" else masked) & denoising.reshape(-1, 1)

    def key_of(key, start, step):  # a draw depends on its request, block and step, not on its batch mates
        return jax.random.fold_in(jax.random.fold_in(key, start), step)

    sampling = asked.sampling
    sampling = sampling.replace(key=jax.vmap(key_of)(sampling.key, window[:, ::block].reshape(-1), step))
    predict_settings = PredictSettings(
        settings.mask_id, settings.sample, settings.cut, entropy=rule == "entropy", raw=rule == "dinfer"
    )
    prediction = predict(
        head_matrix(params, config), hidden.reshape(-1, block, hidden.shape[-1]), needed, sampling, predict_settings
    )

    forced = None if slots == 1 else _forced(state)
    accepted = accepted_by(settings, asked, masked, state.forced_steps.reshape(-1), prediction, forced)
    accepted &= needed & masked
    edited = jnp.zeros_like(accepted)
    if rule == "llada2.1":
        editable = needed & ~masked
        edited = accept.edits(prediction.confidence, prediction.token, old, editable, asked.editing_threshold)
    left, written = masked & ~accepted, accepted | edited
    tokens = jnp.where(written, prediction.token, old).reshape(rows, -1)
    step = jnp.repeat(state.step, block, axis=1)
    state = _put(settings, state, window, tokens, step, prediction.confidence.reshape(rows, -1), written)
    by_block = functools.partial(jnp.reshape, shape=(rows, slots, block))
    done = Step(tokens, *map(by_block, (generated, left, written, edited)), denoising, forced)
    return move_on(settings, state, done)


def _of_blocks(requests: Requests, slots: int) -> Requests:
    """Those of each block: [rows * slots]."""
    if slots == 1:
        return requests
    return jax.tree.map(lambda x: x[jnp.arange(len(x) * slots) // slots], requests)


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

    step int32 [rows]: of the schedule. forced bool [rows]: whether something must be accepted; None: in all rows.
    """
    confidence = prediction.confidence
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
            return accept.entropy(prediction.entropy, masked, requests.entropy_bound, forced)
        case "fixed":
            return accept.fixed(confidence, masked, due)


def _get(canvas, window):
    return jnp.take_along_axis(canvas, jnp.minimum(window, canvas.shape[1] - 1), axis=1)


def _put(settings: DecodeSettings, state: State, window, tokens, step, confidence, written) -> State:
    """The state with what a pass has written: arrays [rows, slots * block], of positions `window`."""
    written = written.reshape(window.shape)
    if settings.history:
        log = _logged(state.log, written, window, tokens, confidence, step, state.denoising_passes)
        state = state.replace(log=log)

    def put(canvas, part):
        if settings.slots > 1:  # a window that may be longer than what is left of the canvas
            return jax.vmap(lambda row, part, at: row.at[at].set(part, mode="drop"))(canvas, part, window)
        return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at,)))(canvas, part, state.start)

    new = dict(written_at=step, confidence=confidence)
    new = {name: jnp.where(written, x, _get(getattr(state, name), window)) for name, x in new.items()}
    new = {name: put(getattr(state, name), x) for name, x in (new | dict(tokens=tokens)).items()}
    return state.replace(**new)


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
