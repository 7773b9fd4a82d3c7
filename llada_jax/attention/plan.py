"""Which chunks of keys each tile of queries reads: the kernel's work list, made once per step from key intervals.

A query tile reads at most two runs of chunks, one of noisy keys and one of clean keys: the hull of its queries'
intervals. The runs are read back to back, a fixed number of chunks per step, so a step may hold chunks of both. Chunks
outside the runs cost nothing. A step whose chunks are all seen by all queries of the tile costs no mask arithmetic. The
list is a few integers per query tile, computed by minima and maxima.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention.tiles import Tiles
from llada_jax.attention.visibility import Visibility

# Columns of Plan.runs. Chunks count from the start of the row: noisy chunks first, then clean ones. A position in the
# run counts noisy chunks, then clean ones; a chunk is noisy_offset or clean_offset + its position.
ROW, COUNT, NOISY_COUNT, NOISY_OFFSET, CLEAN_OFFSET = range(5)
NOISY_FULL_START, NOISY_FULL_END, CLEAN_FULL_START, CLEAN_FULL_END = range(5, 9)  # half-open positions
COLUMNS = 9


@flax.struct.dataclass
class Plan:
    """The work list of a batch of rows; tile t of row b is query tile b * tiles_per_row + t.

    runs [(query tiles + 1) * COLUMNS] int32; an empty tile of row `batch` ends the list. bounds [query tiles, 4, tile]
    int32: noisy start, noisy end, clean start, clean end of each query, half-open, in keys of the row with each half
    padded to whole chunks. forward_steps, backward_steps [1] int32: total numbers of steps. parts: for the backward
    pass, if the gradients of all keys do not fit fast memory together: one plan of the same queries for each part of
    the keys. Parts are equally large and have noisy and clean keys. Under a mesh the arrays concatenate the plans of
    all shards of the tokens, each for its own queries, and num_queries is that of one shard.
    """

    runs: jax.Array
    bounds: jax.Array
    forward_steps: jax.Array
    backward_steps: jax.Array
    parts: tuple["Plan", ...]
    tiles: Tiles = flax.struct.field(pytree_node=False)
    num_queries: int = flax.struct.field(pytree_node=False)
    num_keys: int = flax.struct.field(pytree_node=False)
    num_noisy: int = flax.struct.field(pytree_node=False)

    @property
    def tiles_per_row(self) -> int:
        return -(-self.num_queries // self.tiles.queries)

    @property
    def noisy_chunks(self) -> int:
        return -(-self.num_noisy // self.tiles.chunk)

    @property
    def chunks_per_row(self) -> int:
        return self.noisy_chunks - (-(self.num_keys - self.num_noisy) // self.tiles.chunk)


def make_plan(visibility: Visibility, num_keys: int, tiles: Tiles, parts: int = 1) -> Plan:
    """Returns the plan of a visibility [batch, queries] over num_keys keys, noisy ones first.

    parts: how many parts of the keys the backward pass takes one after the other.
    """
    batch, queries = visibility.clean_start.shape
    noisy_chunks = -(-visibility.num_noisy // tiles.chunk)
    padding = -queries % tiles.queries

    def bounds(start, end, size, offset):
        """Interval bounds [batch, tiles per row, tile] in padded keys; an empty interval is 0 .. 0."""
        start, end = jnp.maximum(start, 0), jnp.minimum(end, size)
        empty = start >= end
        pair = (jnp.where(empty, 0, bound + offset) for bound in (start, end))
        # Padding queries see what the last query sees, so that they change no hull and no class.
        return tuple(
            jnp.pad(bound, ((0, 0), (0, padding)), mode="edge").reshape(batch, -1, tiles.queries) for bound in pair
        )

    noisy = bounds(visibility.noisy_start, visibility.noisy_end, visibility.num_noisy, 0)
    clean_size = num_keys - visibility.num_noisy
    clean = bounds(visibility.clean_start, visibility.clean_end, clean_size, noisy_chunks * tiles.chunk)

    noisy_first, noisy_count, noisy_full_start, noisy_full_end = _run(*noisy, tiles.chunk)
    clean_first, clean_count, clean_full_start, clean_full_end = _run(*clean, tiles.chunk)
    clean_offset = clean_first - noisy_count
    columns = [
        jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], noisy_count.shape),
        # A tile that sees nothing still takes one step, fully masked: it must write its output.
        jnp.maximum(noisy_count + clean_count, 1),
        noisy_count,
        noisy_first,
        clean_offset,
        noisy_full_start - noisy_first,
        noisy_full_end - noisy_first,
        clean_full_start - clean_offset,
        clean_full_end - clean_offset,
    ]
    runs = jnp.stack(columns, axis=-1).reshape(-1, COLUMNS)

    def steps(chunks):
        return jnp.sum(-(-runs[:, COUNT] // chunks), keepdims=True, dtype=jnp.int32)

    return Plan(
        runs=jnp.concatenate([runs.reshape(-1), jnp.array([batch] + [0] * (COLUMNS - 1), jnp.int32)]),
        bounds=jnp.stack([*noisy, *clean], axis=2).reshape(-1, 4, tiles.queries),
        forward_steps=steps(tiles.forward),
        backward_steps=steps(tiles.backward),
        parts=_parts(visibility, num_keys, tiles, parts) if parts > 1 else (),
        tiles=tiles,
        num_queries=queries,
        num_keys=num_keys,
        num_noisy=visibility.num_noisy,
    )


def part_chunks(num_noisy: int, num_keys: int, chunk: int, parts: int) -> tuple[int, int]:
    """Returns the numbers of noisy and of clean chunks in each of `parts` equal parts of the keys."""
    return tuple(-(-size // (chunk * parts)) for size in (num_noisy, num_keys - num_noisy))


def _parts(visibility: Visibility, num_keys: int, tiles: Tiles, parts: int) -> tuple[Plan, ...]:
    noisy, clean = (n * tiles.chunk for n in part_chunks(visibility.num_noisy, num_keys, tiles.chunk, parts))
    # Parts cover padded keys: interval ends beyond the real keys must not reach into the padding.
    noisy_end = jnp.minimum(visibility.noisy_end, visibility.num_noisy)
    clean_end = jnp.minimum(visibility.clean_end, num_keys - visibility.num_noisy)

    def part(i):
        seen = Visibility(
            clean_start=visibility.clean_start - i * clean,
            clean_end=clean_end - i * clean,
            noisy_start=visibility.noisy_start - i * noisy,
            noisy_end=noisy_end - i * noisy,
            num_noisy=noisy,
        )
        return make_plan(seen, noisy + clean, tiles)

    return tuple(map(part, range(parts)))


def _run(start, end, chunk):
    """(first chunk, number of chunks, first full chunk, end of the full chunks) of intervals [..., tile]."""
    seen = end > start
    first = jnp.min(jnp.where(seen, start, jnp.iinfo(jnp.int32).max), axis=-1) // chunk
    last = -(-jnp.max(end, axis=-1) // chunk)
    count = jnp.maximum(last - first, 0)
    full_start = -(-jnp.max(start, axis=-1) // chunk)
    full_end = jnp.min(end, axis=-1) // chunk
    # An empty run or an empty full range is 0 .. 0 at its own first chunk.
    first = jnp.where(count > 0, first, 0)
    full = full_start < full_end
    return first, count, jnp.where(full, full_start, first), jnp.where(full, full_end, first)


def step_classes(plan: Plan, chunks: int) -> jax.Array:
    """Returns int32 [query tiles, most steps of a tile]: 0 no such step, 1 partial (masked), 2 full (no mask).

    For tests and benchmarks: the kernel decides the same from the same numbers. A step with chunks of both runs counts
    as partial, even if every query sees all of them.
    """
    runs = plan.runs.reshape(-1, COLUMNS)[:-1, :, None]
    first = jnp.arange(-(-plan.chunks_per_row // chunks), dtype=jnp.int32)[None] * chunks
    full = is_full(lambda column: runs[:, column], first, chunks)
    return jnp.where(first < runs[:, COUNT], 1 + full, 0)


def is_full(column: Callable[[int], jax.Array], first: jax.Array, chunks: int) -> jax.Array:
    """Returns whether every query of a tile sees every key at positions first .. first + chunks of the tile's run.

    column(i): column i of the tile's run.
    """
    last = first + chunks
    noisy = (first >= column(NOISY_FULL_START)) & (last <= column(NOISY_FULL_END))
    clean = (first >= column(CLEAN_FULL_START)) & (last <= column(CLEAN_FULL_END))
    return noisy | clean
