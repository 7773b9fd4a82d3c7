"""Block-by-block decoding on the device: one `lax.while_loop`, each row at its own block and its own step.

An iteration runs one forward pass over every row's current block against the keys and values of the row's finished
blocks. For a row whose block still holds masks it is a denoising step. For a row whose block has just been completed
it is the commit: the keys and values of the block's final tokens join the cache, and the row moves on. Both may happen
in one iteration, for different rows. The cache is exact because clean tokens see clean blocks only.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention import visibility as vis
from llada_jax.model import head
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution, hidden_states
from llada_jax.sampling import accept
from llada_jax.sampling.predict import draw, predict


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled in; everything else of a request is data."""

    rule: str
    block_length: int
    sample: bool
    top_k: int | None
    eos_early_stop: bool
    max_post_steps: int
    execution: Execution = Execution()


@flax.struct.dataclass
class Requests:
    """Run-time values of a batch: int32 [rows] prompt_length, row_end (end of the last block); scalars otherwise.

    due [steps] int32: tokens due at each step. eos_id -1 never stops.
    """

    prompt_length: jax.Array
    row_end: jax.Array
    due: jax.Array
    threshold: jax.Array
    editing_threshold: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    mask_id: jax.Array
    eos_id: jax.Array
    keys: jax.Array  # [rows], one per request


@flax.struct.dataclass
class State:
    """tokens [rows, canvas] int32 and masked [rows, canvas] bool are the canvas; the rest is per row, [rows].

    start: first position of the current block. complete: the block needs no more steps and awaits its commit.
    last_hidden [rows, embed]: hidden state of the last committed token, which predicts the next one (shifted).
    """

    tokens: jax.Array
    masked: jax.Array
    start: jax.Array
    step: jax.Array
    post_steps: jax.Array
    complete: jax.Array
    finished: jax.Array
    denoising_passes: jax.Array
    commit_passes: jax.Array
    last_hidden: jax.Array
    cache: dict


@functools.partial(jax.jit, static_argnames=("config", "program", "prefill_length"))
def decode(params, config: ModelConfig, program: Program, requests: Requests, tokens, masked, prefill_length: int):
    """Decodes every row to its end. Returns the final State.

    tokens [rows, canvas] int32: prompts, then mask tokens; masked [rows, canvas] bool: positions to fill; canvas is a
    multiple of the block length; prefill_length (static): whole prompt blocks of the longest prompt, in tokens.
    """
    state = _start(params, config, program, requests, tokens, masked, prefill_length)
    step = functools.partial(_iterate, params, config, program, requests)
    return jax.lax.while_loop(lambda state: ~state.finished.all(), step, state)


def _start(params, config, program, requests, tokens, masked, prefill_length) -> State:
    """Prefills the whole blocks of every prompt in one block-causal pass; the tail joins the first decoded block."""
    rows, canvas = tokens.shape
    start = requests.prompt_length // program.block_length * program.block_length
    dtype = params["embedding"].dtype
    cache = _empty_cache(config, rows, canvas, dtype)
    last_hidden = jnp.zeros((rows, config.hidden_size), dtype)
    if prefill_length:
        prompt = tokens[:, :prefill_length]
        visibility = vis.block_causal(vis.layout(jnp.ones_like(prompt), program.block_length))
        positions = jnp.broadcast_to(jnp.arange(prefill_length), prompt.shape)
        hidden, computed = hidden_states(params, config, prompt, positions, visibility, program.execution)
        cache = jax.tree.map(lambda whole, part: whole.at[:, :, :prefill_length].set(part), cache, computed)
        previous = jnp.maximum(start - 1, 0)[:, None, None]
        last_hidden = jnp.take_along_axis(hidden, previous, axis=1)[:, 0]
        last_hidden = jnp.where(start[:, None] > 0, last_hidden, 0)  # nothing precedes the first token
    zeros, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    return State(
        tokens=tokens, masked=masked, start=start, step=zeros, post_steps=zeros, complete=no, finished=no,
        denoising_passes=zeros, commit_passes=zeros, last_hidden=last_hidden, cache=cache,
    )  # fmt: skip


def _empty_cache(config, rows, canvas, dtype):
    def zeros(layers):
        return jnp.zeros((len(layers), rows, canvas, config.num_kv_heads, config.head_dim), dtype)

    return {group: {"key": zeros(layers), "value": zeros(layers)} for group, layers in config.layer_groups.items()}


def _iterate(params, config, program, requests, state: State) -> State:
    rows = jnp.arange(state.start.shape[0])[:, None]
    window = state.start[:, None] + jnp.arange(program.block_length)[None]
    block, masked = state.tokens[rows, window], state.masked[rows, window]
    visibility = vis.window(state.start, program.block_length)
    hidden, computed = hidden_states(params, config, block, window, visibility, program.execution, cache=state.cache)
    predicted, confidence = _predict(params, config, program, requests, state, hidden)

    denoising = ~state.complete & ~state.finished
    due = requests.due[jnp.minimum(state.step, requests.due.shape[0] - 1)]
    editable = ~masked & (window >= requests.prompt_length[:, None])
    accepted, edited = _accept(program, requests, block, masked, editable, predicted, confidence, due)
    accepted, edited = accepted & denoising[:, None], edited & denoising[:, None]
    block = jnp.where(accepted | edited, predicted, block)
    left = masked & ~accepted
    tokens = state.tokens.at[rows, window].set(block)
    all_masked = state.masked.at[rows, window].set(left)

    step, post_steps, complete = _progress(program, requests, state, masked, left, edited)
    complete = complete & denoising
    finished = state.finished | _finished(program, requests, state, tokens, all_masked, accepted, predicted, complete)

    commit = state.complete & ~state.finished
    where = jnp.where(commit[:, None], window, tokens.shape[1])  # out of bounds is dropped
    cache = jax.tree.map(lambda old, new: old.at[:, rows, where].set(new, mode="drop"), state.cache, computed)
    return State(
        tokens=tokens,
        masked=all_masked,
        start=jnp.where(commit, state.start + program.block_length, state.start),
        step=jnp.where(denoising, step, 0),
        post_steps=jnp.where(denoising, post_steps, 0),
        complete=complete & ~finished,
        finished=finished,
        denoising_passes=state.denoising_passes + denoising,
        commit_passes=state.commit_passes + commit,
        last_hidden=jnp.where(commit[:, None], hidden[:, -1], state.last_hidden),
        cache=cache,
    )


def _predict(params, config, program, requests, state, hidden):
    if config.alignment == "shifted":
        hidden = jnp.concatenate([state.last_hidden[:, None], hidden[:, :-1]], axis=1)
    logits = head.logits(params, config, hidden)
    if not program.sample:
        return predict(logits, requests.mask_id)

    def key_of(key, start, step):  # a draw depends on its request, block and step, not on its batch mates
        return jax.random.fold_in(jax.random.fold_in(key, start), step)

    keys = jax.vmap(key_of)(requests.keys, state.start, state.step)
    return draw(logits, requests.mask_id, keys, requests.temperature, program.top_k, requests.top_p)


def _accept(program, requests, block, masked, editable, predicted, confidence, due):
    """(positions that lose their mask, positions that are rewritten), bool [rows, block]."""
    if program.rule == "llada2":
        accepted = accept.accept_llada2(confidence, masked, due, requests.threshold)
        return accepted, jnp.zeros_like(accepted)
    one = jnp.ones_like(due)
    accepted = accept.accept_llada2(confidence, masked, one, requests.threshold)
    return accepted, accept.edits(confidence, predicted, block, editable, requests.editing_threshold)


def _progress(program, requests, state, masked, left, edited):
    """(step, post_steps, complete) after a denoising step of each row."""
    step = state.step + 1
    if program.rule == "llada2":
        return step, state.post_steps, ~left.any(-1) | (step >= requests.due.shape[0])
    # LLaDA2.1: a full block is edited until a pass changes nothing, or max_post_steps are spent.
    settled = ~masked.any(-1) & ~edited.any(-1)
    post_steps = state.post_steps + ~masked.any(-1)
    return step, post_steps, settled | (~left.any(-1) & (post_steps + 1 > program.max_post_steps))


def _finished(program, requests, state, tokens, masked, accepted, predicted, complete):
    """Rows that need nothing more: their last block is complete, or an end of sequence stands among written tokens."""
    position = jnp.arange(tokens.shape[1])[None]
    generated = position >= requests.prompt_length[:, None]
    block_end = state.start + program.block_length
    ends = generated & ~masked & (tokens == requests.eos_id) & (position < block_end[:, None])
    finished = complete & (block_end >= requests.row_end)
    if program.rule == "llada2" or program.eos_early_stop:
        finished |= complete & ends.any(-1)
    if program.rule == "llada2" and program.eos_early_stop:
        # As the reference: looked at only in a step that writes an end of sequence.
        written = (accepted & (predicted == requests.eos_id)).any(-1)
        first_end = jnp.argmax(ends, axis=-1)
        gap = (generated & masked & (position < first_end[:, None])).any(-1)
        finished |= written & ends.any(-1) & ~gap
    return finished
