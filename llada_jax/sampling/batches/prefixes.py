"""Keys and values of the beginnings of prompts, kept on the device for later prompts that begin alike.

Prompts that are computed in chunks leave their whole chunks here, and take those that are known instead of computing
them. A chunk's keys and values depend on its tokens and those before it alone, and one program computes all chunks: so
what is taken equals what would be computed, bit for bit. The chunk that ends a prompt is always computed.
"""

import collections
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llada_jax import sharding
from llada_jax.attention.decoding.cache_rows import take_rows
from llada_jax.attention.decoding.cache_write import write_blocks
from llada_jax.attention.decoding.cached import CACHE_AXES
from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Cache, Execution
from llada_jax.sampling.state import DecodeSettings, State, constrain_cache, empty_state


class Prefixes:
    """Chunks of prompts, at most `most_bytes` on each device; those that were used least recently are given up.

    For one model and one Execution. Not for several threads at once. hits, misses: chunks that were taken, and whole
    chunks that were computed. bytes: of each device, now. Raises InputError on a number of bytes below 1.
    """

    def __init__(self, most_bytes: int):
        if most_bytes < 1:
            raise InputError(f"prefix_bytes={most_bytes}, expected at least 1")
        self._most = most_bytes
        self.hits = self.misses = 0
        self.clear()

    def __len__(self) -> int:
        return len(self._chunks)

    def clear(self) -> None:
        self._chunks: collections.OrderedDict[bytes, Cache] = collections.OrderedDict()
        self.bytes = 0

    def take(self, state: State, row: int, keys: list[bytes], filled: int, size: int) -> tuple[State, int]:
        """(The state with what is known of a prompt in the cache of `row`, tokens of it that are there now).

        keys: of the prompt's chunks of `size` tokens but its last one, of which the first `filled` tokens are there
        already. Donates the state's cache.
        """
        rows, _ = place_of(row, len(state.finished))
        for i in range(filled // size, self._known(keys)):
            first = np.full(len(rows), i * size, np.int32)
            state = state.replace(cache=_put(state.cache, self._chunks[keys[i]], rows, first))
            self.hits += 1
            filled += size
        return state, filled

    def keep(self, state: State, row: int, keys: list[bytes], size: int) -> None:
        """Keeps the chunk of the last of `keys`, which are those of a prompt in `row` up to what is just computed."""
        self.misses += 1
        if keys[-1] not in self._chunks:
            rows, part = place_of(row, len(state.finished))
            chunk = _get(state.cache, rows, np.int32((len(keys) - 1) * size), np.int32(part), size)
            self._chunks[keys[-1]] = chunk
            self.bytes += _device_bytes(chunk)
        self._known(keys)
        while self.bytes > self._most:
            self.bytes -= _device_bytes(self._chunks.popitem(last=False)[1])

    def _known(self, keys: list[bytes]) -> int:
        """How many of the first keys are here without a gap. They count as used, the first as the most recent: a chunk
        without those before it is of no use.
        """
        count = next((i for i, key in enumerate(keys) if key not in self._chunks), len(keys))
        for key in reversed(keys[:count]):
            self._chunks.move_to_end(key)
        return count


def chain(settings: DecodeSettings, canvas: int, prompt: np.ndarray) -> list[bytes]:
    """The keys of a prompt's whole chunks: each a hash of all tokens up to its end, and of how they are computed."""
    size = min(settings.prefill_chunk, canvas)
    digest, keys = hashlib.sha256(f"{settings.block_length} {size} {canvas} ".encode()), []
    for end in range(size, len(prompt) // settings.block_length * settings.block_length + 1, size):
        digest.update(prompt[end - size : end].astype(np.int32).tobytes())
        keys.append(digest.digest())
    return keys


def place_of(row: int, rows: int) -> tuple[np.ndarray, int]:
    """(rows as cache_rows.take_rows has them, with none but `row`; the part of the mesh that has it)."""
    parts = sharding.num_parts("batch", rows)
    part = row // (rows // parts)
    return np.where(np.arange(parts) == part, row, rows).astype(np.int32), part


def chunk_bytes(config: ModelConfig, execution: Execution, size: int, dtype: str) -> int:
    """Bytes of a chunk of `size` tokens, on each device of the mesh in force."""
    settings = DecodeSettings(mask_id=0, execution=execution)
    cache = jax.eval_shape(functools.partial(empty_state, config, settings, 1, size, dtype)).cache
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return whole // sharding.num_parts("kv_heads", config.num_kv_heads)


def _device_bytes(chunk: Cache) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(chunk))


@functools.partial(jax.jit, static_argnames="size")
def _get(cache: Cache, rows: jax.Array, first: jax.Array, part: jax.Array, size: int) -> Cache:
    """Keys and values [layers, 1, kv_heads, size, head_dim] of the row of a part, on the devices of all parts."""

    def get(x):
        chunk = lax.dynamic_slice_in_dim(take_rows(x, rows), first, size, axis=3)
        return sharding.constrain(lax.dynamic_slice_in_dim(chunk, part, 1, axis=1), CACHE_AXES)

    return jax.tree.map(get, cache)


@functools.partial(jax.jit, donate_argnames="cache")
def _put(cache: Cache, chunk: Cache, rows: jax.Array, first: jax.Array) -> Cache:
    """The cache with a chunk of _get in `rows`, at positions `first` [parts]."""

    def put(x, chunk):
        of_parts = jnp.broadcast_to(chunk, (len(chunk), len(rows), *chunk.shape[2:]))
        of_parts = sharding.constrain(of_parts, CACHE_AXES)
        return write_blocks(x, of_parts, first, rows < x.shape[1], rows=rows)

    return constrain_cache(jax.tree.map(put, cache, chunk))
