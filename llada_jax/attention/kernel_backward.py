"""The backward kernel: the gradients of query, key and value in one pass over the steps of a plan.

The weights are recomputed from the saved log-sum. Gradients of keys and values accumulate in fast memory, in float32
for all keys of one row and one key/value head, and are written when the row ends. The gradient of queries accumulates
per query tile. So each tile is visited once (five matrix products), and nothing larger than the gradients is ever
written.

Fast memory limits the keys of a row, at head_dim 64 and 128 alike (a register has 128 lanes): 8 thousand on v4, 44
thousand on v5p and tpu7x, 109 thousand on v5e and v6e. Longer rows are cut into equal parts (`key_parts`): the kernel
runs once for each part of the keys, and the gradients of queries are summed after them in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_walk import AHEAD, RING, TileStep, Walk, dot, launch, room_for_scratch, scratch_bytes
from llada_jax.attention.plan import Plan, part_chunks
from llada_jax.attention.tiles import Tiles


def key_parts(num_noisy: int, num_keys: int, tiles: Tiles, group: int, head_dim: int) -> int:
    """Returns into how many parts to cut the keys of a row so that their gradients fit the chip's fast memory."""
    room = room_for_scratch()
    parts = 1
    while True:
        chunks = sum(part_chunks(num_noisy, num_keys, tiles.chunk, parts))
        scratch = _scratch(tiles, group * tiles.queries, chunks, head_dim, jnp.float32, jnp.float32)
        if scratch_bytes(scratch.values()) <= room:
            return parts
        parts += 1


def _scratch(tiles: Tiles, rows: int, chunks_per_row: int, head_dim: int, dtype, d_query_dtype) -> dict:
    chunks, chunk = tiles.backward, tiles.chunk
    return dict(
        query_ring=pltpu.VMEM((RING, rows, head_dim), dtype),
        cotangent_ring=pltpu.VMEM((RING, rows, head_dim), dtype),
        statistics_ring=pltpu.VMEM((RING, 2, rows), jnp.float32),
        bounds_ring=pltpu.VMEM((RING, 4, tiles.queries), jnp.int32),
        key_ring=pltpu.VMEM((RING, chunks, chunk, head_dim), dtype),
        value_ring=pltpu.VMEM((RING, chunks, chunk, head_dim), dtype),
        d_query_pair=pltpu.VMEM((2, rows, head_dim), d_query_dtype),
        d_query_sum=pltpu.VMEM((head_dim, rows), jnp.float32),
        d_key_sum=pltpu.VMEM((chunks_per_row, chunk, head_dim), jnp.float32),
        d_value_sum=pltpu.VMEM((chunks_per_row, chunk, head_dim), jnp.float32),
    )


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array, statistics: jax.Array, plan: Plan,
    d_query_dtype, interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradients of (scaled query, key, value), each like its operand; key's and value's are float32.

    query, key, value as in the forward kernel; cotangent [kv_heads, query tiles, rows, head_dim]; statistics [kv_heads,
    query tiles, 2, rows] float32: the forward kernel's log-sums and the sums of output * cotangent over head_dim.
    The gradient is that of exp2: the caller applies the factors for log2(e) / sqrt(head_dim). Raises InputError if the
    gradients of all the plan's keys do not fit fast memory: key and value must then come in parts.
    """
    _, num_tiles, rows, head_dim = query.shape
    operands = dict(
        query=query, cotangent=cotangent, statistics=statistics, bounds=plan.bounds, key=key, value=value
    )  # fmt: skip
    results = dict(
        d_query=pltpu.HBM(query.shape, d_query_dtype),
        d_key=pltpu.HBM(key.shape, jnp.float32),
        d_value=pltpu.HBM(value.shape, jnp.float32),
    )
    scratch = _scratch(plan.tiles, rows, plan.chunks_per_row, head_dim, query.dtype, d_query_dtype)
    semaphores = dict(
        query_done=RING, cotangent_done=RING, statistics_done=RING, bounds_done=RING, key_done=RING, value_done=RING,
        d_query_done=2, row_done=2,
    )  # fmt: skip

    def kernel(steps, runs, refs):
        _Backward(plan, num_tiles, runs, refs).run(steps)

    name = "block_diffusion_attention_backward"
    return launch(kernel, name, plan.backward_steps, plan, operands, results, scratch, semaphores, interpret)


class _Backward:
    """The kernel of one key/value head. refs: the operands, results, scratch buffers and semaphores of `backward`."""

    def __init__(self, plan: Plan, num_tiles: int, runs, refs):
        self.refs, self.plan, self.num_tiles, self.head = refs, plan, num_tiles, pl.program_id(0)
        self.walk = Walk(runs, plan, num_tiles, plan.tiles.backward)

    def tile_copies(self, tile):
        refs = self.refs
        slot = tile % RING
        query, cotangent, statistics = (x.at[self.head, tile] for x in (refs.query, refs.cotangent, refs.statistics))
        return (
            pltpu.make_async_copy(query, refs.query_ring.at[slot], refs.query_done.at[slot]),
            pltpu.make_async_copy(cotangent, refs.cotangent_ring.at[slot], refs.cotangent_done.at[slot]),
            pltpu.make_async_copy(statistics, refs.statistics_ring.at[slot], refs.statistics_done.at[slot]),
            pltpu.make_async_copy(refs.bounds.at[tile], refs.bounds_ring.at[slot], refs.bounds_done.at[slot]),
        )

    def result_copy(self, tile):
        refs = self.refs
        slot = tile % 2
        d_query = refs.d_query.at[self.head, tile]
        return pltpu.make_async_copy(refs.d_query_pair.at[slot], d_query, refs.d_query_done.at[slot])

    def start_chunks(self, step, index):
        refs = self.refs
        sources, rings = (refs.key, refs.value), (refs.key_ring, refs.value_ring)
        self.walk.start_chunks(self.head, step, index % RING, sources, rings, (refs.key_done, refs.value_done))

    def wait_chunks(self, index):
        refs = self.refs
        self.walk.wait_chunks(refs.key, refs.key_ring, refs.key_done, index % RING)
        self.walk.wait_chunks(refs.value, refs.value_ring, refs.value_done, index % RING)

    def start_tile(self, step):
        @pl.when((step.number == 0) & (step.tile < self.num_tiles))
        def _():
            for copy in self.tile_copies(step.tile):
                copy.start()

    def compute(self, step, following, last, index, masked):
        refs = self.refs
        slot = step.tile % RING
        queries, cotangents = refs.query_ring[slot], refs.cotangent_ring[slot]
        keys = refs.key_ring[index % RING].reshape(-1, refs.key.shape[-1])
        values = refs.value_ring[index % RING].reshape(-1, refs.value.shape[-1])
        scores = dot(keys, queries, 1, 1)
        if masked:
            scores = self.walk.masked(scores, refs.bounds_ring[slot], step)
        log_sum, projection = refs.statistics_ring[slot, 0:1], refs.statistics_ring[slot, 1:2]
        weights = jnp.exp2(scores - log_sum)
        d_weights = dot(values, cotangents, 1, 1)
        d_scores = (weights * (d_weights - projection)).astype(keys.dtype)
        d_values = dot(weights.astype(values.dtype), cotangents, 1, 0)
        d_keys = dot(d_scores, queries, 1, 0)
        refs.d_query_sum[...] += dot(keys, d_scores, 0, 0)
        size = self.plan.tiles.chunk
        for i, (chunk, _, _) in enumerate(self.walk.step_chunks(step)):
            refs.d_key_sum[chunk] += d_keys[i * size : (i + 1) * size]
            refs.d_value_sum[chunk] += d_values[i * size : (i + 1) * size]
        # Among the arithmetic, where the scalar unit is idle.
        self.start_chunks(last, index + AHEAD)
        return self.walk.is_full(following), *self.walk.after(last)

    def finish_tile(self, tile):
        refs = self.refs
        pl.when(tile >= 2)(lambda: self.result_copy(tile - 2).wait())
        refs.d_query_pair[tile % 2] = refs.d_query_sum[...].T.astype(refs.d_query.dtype)
        refs.d_query_sum[...] = jnp.zeros_like(refs.d_query_sum)
        self.result_copy(tile).start()

    def reset_row(self):
        refs = self.refs

        @pl.loop(0, self.plan.chunks_per_row)
        def _(chunk):
            refs.d_key_sum[chunk] = jnp.zeros_like(refs.d_key_sum[chunk])
            refs.d_value_sum[chunk] = jnp.zeros_like(refs.d_value_sum[chunk])

    def finish_row(self, row):
        refs = self.refs
        row_chunks = pl.ds(row * self.plan.chunks_per_row, self.plan.chunks_per_row)
        copies = (
            pltpu.make_async_copy(refs.d_key_sum, refs.d_key.at[self.head, row_chunks], refs.row_done.at[0]),
            pltpu.make_async_copy(refs.d_value_sum, refs.d_value.at[self.head, row_chunks], refs.row_done.at[1]),
        )
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        self.reset_row()

    def body(self, index, carry):
        full, *flat = carry
        step, *later = (TileStep(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
        self.wait_chunks(index)

        @pl.when(step.number == 0)
        def _():
            for copy in self.tile_copies(step.tile):
                copy.wait()

        self.start_tile(later[-1])
        run = functools.partial(self.compute, step, later[0], later[-1], index)
        full, *new = lax.cond(full, lambda: run(masked=False), lambda: run(masked=True))
        last = self.walk.is_last(step)
        pl.when(last)(lambda: self.finish_tile(step.tile))
        row = self.walk.row(step.tile)
        # Past the end of the list is a row of its own, so that the last row ends as well.
        pl.when(last & (row != self.walk.row(step.tile + 1)))(lambda: self.finish_row(row))
        return full, *(x for s in later for x in s), *new

    def run(self, steps):
        refs = self.refs
        first = self.walk.first()
        for index, step in enumerate(first[:AHEAD]):
            self.start_chunks(step, index)
            self.start_tile(step)
        refs.d_query_sum[...] = jnp.zeros_like(refs.d_query_sum)
        self.reset_row()
        lax.fori_loop(0, steps[0], self.body, (self.walk.is_full(first[0]), *(x for step in first for x in step)))
        for i in range(AHEAD):  # Copies of the steps past the end.
            self.wait_chunks(steps[0] + i)
        for tile in range(max(self.num_tiles - 2, 0), self.num_tiles):
            self.result_copy(tile).wait()
