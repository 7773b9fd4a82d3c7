"""Keys and values of prompts: short ones in one block-causal pass, long ones chunk by chunk.

A chunk is a pass over some of a prompt's blocks, which see the cached blocks before them. So a prompt of any length
takes the memory of a chunk, and rows that decode go on between two chunks. A tail of less than a block is part of the
first decoded block.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.attention.decoding.cache_rows import take_rows
from llada_jax.attention.decoding.cache_write import write_blocks
from llada_jax.attention.decoding.cached_kernel import ALIGNED
from llada_jax.attention.visibility import block_causal, block_window, make_layout
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Cache, Execution, hidden_states
from llada_jax.model.parameters import Params
from llada_jax.sampling.state import DecodeSettings, State


def prefill_whole(
    params: Params, config: ModelConfig, prompts: jax.Array, block: int, execution: Execution
) -> tuple[jax.Array, Cache]:
    """Returns hidden states [rows, length, embed] and keys and values of prompts [rows, length], int32, in one pass.

    The hidden states have a meaning with shifted alignment only: otherwise nothing is predicted from them.
    """
    visibility = block_causal(make_layout(jnp.ones_like(prompts), block))
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    return hidden_states(params, config, prompts, positions, visibility, execution, num_outputs=_num_outputs(config))


def prefill_chunk(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, rows: jax.Array, first: jax.Array
) -> State:
    """Computes settings.prefill_chunk tokens from position `first` (int32 [parts], of whole blocks) in the prompts of
    `rows`, which are as in cache_rows.take_rows; out of bounds, none. Blocks before `first` are in the cache. A row
    whose prompt ends within the chunk starts to decode.
    """
    block, (all_rows, canvas) = settings.block_length, state.tokens.shape
    size = min(settings.prefill_chunk, canvas)
    first = jnp.minimum(first, canvas - size)  # at the canvas' end, some tokens are computed again
    place = first[:, None] + jnp.arange(size)[None]
    row = jnp.minimum(rows, all_rows - 1)
    cache = jax.tree.map(lambda x: take_rows(x, rows), state.cache)
    visibility = block_window(first, block, size)
    tokens = state.tokens[row[:, None], place]
    how = dict(execution=settings.execution, cache=cache, num_outputs=_num_outputs(config))
    hidden, computed = hidden_states(params, config, tokens, place, visibility, **how)
    last = state.start[row] - 1 - first  # its hidden state predicts the first decoded token
    ends = (last >= 0) & (last < size)
    last_hidden = jnp.take_along_axis(hidden, jnp.clip(last, 0, size - 1)[:, None, None], axis=1)[:, 0]
    last_hidden = jnp.where(ends[:, None], last_hidden.astype(state.last_hidden.dtype), state.last_hidden[row])
    execution = settings.execution
    write = functools.partial(
        write_blocks, at=first, selected=rows < all_rows, rows=rows, interpret=execution.interpret,
        kernel=execution.attention == "kernel" and block % ALIGNED == 0,
    )  # fmt: skip
    return state.replace(
        cache=jax.tree.map(write, state.cache, computed),
        last_hidden=state.last_hidden.at[rows].set(last_hidden, mode="drop"),
        finished=state.finished.at[rows].set(state.finished[row] & ~ends, mode="drop"),
    )


def prefill_long(fill: Callable[[State, jax.Array, jax.Array], State], state: State, chunk: int) -> State:
    """prefill_chunk, as fill(state, rows, first), over the prompts of all rows: those of each part one after the other,
    each from its first token to its last block.
    """
    parts = sharding.num_parts("batch", state.tokens.shape[0])
    groups = jnp.arange(state.tokens.shape[0]).reshape(parts, -1).T

    def of_rows(i, state):
        rows = groups[i]
        chunks = -(-state.start[rows].max() // chunk)
        return jax.lax.fori_loop(0, chunks, lambda j, state: fill(state, rows, jnp.full(parts, j * chunk)), state)

    return jax.lax.fori_loop(0, len(groups), of_rows, state)


def _num_outputs(config: ModelConfig) -> int | None:
    return None if config.alignment == "shifted" else 0


def is_long(length: int, settings: DecodeSettings) -> bool:
    """Whether a prompt of this length is computed in chunks."""
    return num_passes(length, settings) > 1


def num_passes(length: int, settings: DecodeSettings) -> int:
    """Of the prefill of a prompt of this length."""
    whole = length // settings.block_length * settings.block_length
    return -(-whole // settings.prefill_chunk)
