"""What a denoising pass does with its hidden states: predicts, accepts and edits tokens, and moves rows on."""

import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig
from llada_jax.model.head import head_matrix
from llada_jax.model.parameters import Params
from llada_jax.sampling import accept
from llada_jax.sampling.predict import Prediction, PredictSettings, predict
from llada_jax.sampling.state import DecodeSettings, Requests, State, WriteLog

PREDICTION = "prediction"  # scope of the head and of what accepts its tokens


@jax.named_scope(PREDICTION)
def denoise(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, hidden: jax.Array, denoising: jax.Array
) -> State:
    """Accepts predictions in the rows that are `denoising` (bool [rows]); rows with a full block go to the next one.

    hidden [rows, block, embed]: of the current blocks, aligned with the tokens they predict.
    """
    rule, requests, masked, block = settings.rule, state.requests, state.masked, settings.block_length
    window = state.start[:, None] + jnp.arange(block)[None]
    old = _get(state.tokens, window)
    generated = window >= requests.prompt_length[:, None]
    needed = (generated if rule == "llada2.1" else masked) & denoising[:, None]

    def key_of(key, start, step):  # a draw depends on its request, block and step, not on its batch mates
        return jax.random.fold_in(jax.random.fold_in(key, start), step)

    sampling = requests.sampling
    sampling = sampling.replace(key=jax.vmap(key_of)(sampling.key, state.start, state.step))
    predict_settings = PredictSettings(
        settings.mask_id, settings.sample, settings.cut, entropy=rule == "entropy", raw=rule == "dinfer"
    )
    prediction = predict(head_matrix(params, config), hidden, needed, sampling, predict_settings)

    accepted = accepted_by(settings, requests, masked, state.step, prediction) & needed & masked
    edited = jnp.zeros_like(accepted)
    if rule == "llada2.1":
        editable = needed & ~masked
        edited = accept.edits(prediction.confidence, prediction.token, old, editable, requests.editing_threshold)
    left, written = masked & ~accepted, accepted | edited
    tokens = jnp.where(written, prediction.token, old)
    full, step, post_steps = _progress(settings, state, left, edited)
    full &= denoising
    ended = _ended(settings, requests, generated, tokens, left, written, full)
    finished = state.finished | ended | (full & (state.start + block >= requests.row_end))

    moves = full & ~finished
    start = jnp.where(moves, state.start + block, state.start)
    if settings.history:
        log = _logged(state.log, written, window, tokens, prediction.confidence, state.step, state.denoising_passes)
        state = state.replace(log=log)
    return state.replace(
        tokens=_put(state.tokens, tokens, state.start),
        written_at=_put(
            state.written_at, jnp.where(written, state.step[:, None], _get(state.written_at, window)), state.start
        ),
        confidence=_put(
            state.confidence, jnp.where(written, prediction.confidence, _get(state.confidence, window)), state.start
        ),
        masked=left | moves[:, None],
        start=start,
        step=jnp.where(moves, 0, jnp.where(denoising, step, state.step)),
        post_steps=jnp.where(moves, 0, jnp.where(denoising, post_steps, state.post_steps)),
        pending=state.pending | moves,
        finished=finished,
        denoising_passes=state.denoising_passes + denoising,
    )


def _get(canvas, window):
    return jnp.take_along_axis(canvas, jnp.minimum(window, canvas.shape[1] - 1), axis=1)


def _put(canvas, block, start):
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at,)))(canvas, block, start)


def _logged(log: WriteLog, written, window, tokens, confidence, step, forward) -> WriteLog:
    """Appends what a pass has written: arrays [rows, block], step and forward [rows]. What is too much is counted."""
    capacity = log.token.shape[1]
    place = log.count[:, None] + jnp.cumsum(written, axis=1) - 1
    place = jnp.where(written, place, capacity)  # out of bounds: dropped
    row = jnp.arange(len(written))[:, None]
    step, forward = (jnp.broadcast_to(x[:, None], written.shape) for x in (step, forward))
    new = dict(position=window, token=tokens, step=step, forward=forward, confidence=confidence)
    new = {name: getattr(log, name).at[row, place].set(x, mode="drop") for name, x in new.items()}
    return WriteLog(count=log.count + written.sum(axis=1), **new)


def accepted_by(
    settings: DecodeSettings, requests: Requests, masked: jax.Array, step: jax.Array, prediction: Prediction
) -> jax.Array:
    """Returns the masked positions that the rule accepts, bool like masked [rows, block]. step [rows]."""
    confidence = prediction.confidence
    due = accept.due(settings.block_length, requests.max_steps, step)
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
    """(full: the block needs no more steps, step, post_steps), [rows], after a denoising step of each row."""
    step, was_full = state.step + 1, ~state.masked.any(-1)
    if settings.rule != "llada2.1":
        return ~left.any(-1), step, state.post_steps
    # LLaDA2.1: a full block is edited until a pass changes nothing, or max_post_steps are spent.
    post_steps = state.post_steps + was_full
    settled = was_full & ~edited.any(-1)
    spent = ~left.any(-1) & (post_steps + 1 > state.requests.max_post_steps)
    return settled | spent, step, post_steps


def _ended(settings, requests: Requests, generated, tokens, left, written, full) -> jax.Array:
    """Returns bool [rows]: rows that stop at an end of sequence in the current block, as the rule has it.

    Earlier blocks hold none, or the row would have stopped there.
    """
    ends = generated & ~left & (tokens[:, :, None] == requests.eos_ids[:, None]).any(-1)
    between_blocks = full & ends.any(-1)
    if settings.rule == "llada2.1":  # as its reference, only when asked to
        return between_blocks & requests.eos_early_stop
    first_end = jnp.argmax(ends, axis=-1)
    gap = (left & (jnp.arange(left.shape[1])[None] < first_end[:, None])).any(-1)
    inside = ends.any(-1) & ~gap
    if settings.rule == "llada2":  # as its reference, looked at only in a step that writes an end of sequence
        inside &= (written & ends).any(-1)
    return between_blocks | (inside & requests.eos_early_stop)
