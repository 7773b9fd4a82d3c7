"""Decoding of several blocks of a row at once, as models of multi-block training do (MultiTF, arXiv 2606.29215).

A pass has one window of each row: its finished blocks that are not in the cache yet, then its active ones, which hold
masks. Each block sees the cache and the window's blocks up to its own. So the finished ones, which come first, see
final tokens only: their keys and values are exact, and are committed.

    cached | finished  active  active  dummy        finished: State.pending blocks before State.start
           |           ^start                       active: State.active blocks from there on

The window is as long as the neediest row needs; dummies of the others are seen by nothing.
"""

import functools

import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.attention.decoding import prefix
from llada_jax.attention.decoding.cache_write import write_blocks
from llada_jax.attention.visibility import block_window
from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Cache, hidden_states
from llada_jax.model.parameters import Params
from llada_jax.sampling.denoise import denoise
from llada_jax.sampling.state import DecodeSettings, State, constrain_cache


def iterate(params: Params, config: ModelConfig, settings: DecodeSettings, state: State) -> State:
    """One decoding step of the whole batch, as decode.iterate. Raises InputError if the kernel of attention cannot take
    windows of so many blocks.
    """
    block, slots = settings.block_length, settings.slots
    check_kernel(config, settings, len(state.start))
    running = ~state.finished
    # At most slots + 1: those that finished together, and one of those left or new.
    width = jnp.max(jnp.where(running, state.pending + state.active, 1))
    passes = [functools.partial(window_pass, params, config, settings, state, n) for n in range(1, slots + 2)]
    hidden, computed, last_hidden = jax.lax.switch(width - 1, passes)

    execution, cache = settings.execution, state.cache
    for n in range(slots):
        write = functools.partial(
            write_blocks, at=state.start + (n - state.pending) * block, selected=running & (n < state.pending),
            kernel=execution.attention == "kernel", interpret=execution.interpret,
        )  # fmt: skip
        of_block = jax.tree.map(lambda x, n=n: x[:, :, :, n * block : (n + 1) * block], computed)
        cache = jax.tree.map(write, cache, of_block)
    state = state.replace(
        cache=constrain_cache(cache),
        last_hidden=jnp.where((running & (state.pending > 0))[:, None], last_hidden, state.last_hidden),
        pending=jnp.where(running, 0, state.pending),
        positions_evaluated=state.positions_evaluated + running * width * block,
        iterations=state.iterations + 1,
        busy=state.busy + running.sum(),
        batch_positions=state.batch_positions + running.size * width * block,
    )
    denoising = running[:, None] & (jnp.arange(slots)[None] < state.active[:, None])
    return denoise(params, config, settings, state, hidden, denoising)


def window_pass(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, blocks: int
) -> tuple[jax.Array, Cache, jax.Array]:
    """Forward pass over windows of so many blocks.

    Returns hidden states [rows, slots * block, embed] aligned with the tokens of the active blocks, the keys and values
    of the window's first `slots` blocks (zeros beyond its end), and the hidden state [rows, embed] of the last finished
    token.
    """
    block, slots, canvas = settings.block_length, settings.slots, state.tokens.shape[1]
    length, finished = blocks * block, state.pending * block
    first = state.start - finished
    window = jnp.clip(first[:, None] + jnp.arange(length)[None], 0, canvas - 1)
    tokens = jnp.take_along_axis(state.tokens, window, axis=1)
    visibility = block_window(first, block, length)
    hidden, computed = hidden_states(params, config, tokens, window, visibility, settings.execution, cache=state.cache)

    kept = min((blocks - 1), slots) * block  # of the last block, nothing is committed

    def padded(x):
        return jnp.pad(x[:, :, :, :kept], ((0, 0), (0, 0), (0, 0), (0, slots * block - kept), (0, 0)))

    def taken(places):
        return jnp.take_along_axis(hidden, jnp.clip(places, 0, length - 1)[:, :, None], axis=1)

    last = finished[:, None] - 1
    places = finished[:, None] + jnp.arange(slots * block)[None] - (config.alignment == "shifted")
    active = taken(places)
    if config.alignment == "shifted":
        active = jnp.where(places[:, :, None] < 0, state.last_hidden[:, None].astype(active.dtype), active)
    return active, jax.tree.map(padded, computed), taken(last)[:, 0]


def check_kernel(config: ModelConfig, settings: DecodeSettings, rows: int) -> None:
    """Raises InputError if the kernel of attention is to be used and cannot take windows of so many blocks."""
    group = sharding.group_size(config.num_heads, config.num_kv_heads)
    queries = (settings.slots + 1) * settings.block_length
    too_many = queries * group > prefix.MOST_OF_A_WINDOW and not prefix.takes(queries, rows, group)
    if settings.execution.attention == "kernel" and too_many:
        raise InputError(
            f"active_blocks={settings.slots} with block_length={settings.block_length}: attention='kernel' takes "
            f"windows of at most {prefix.MOST_OF_A_WINDOW // group} tokens, of one block more than are active"
        )
