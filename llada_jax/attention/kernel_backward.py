"""The backward kernel: the gradients of query, key and value in one pass over the steps of a plan.

The weights are recomputed from the saved log-sum. Gradients of keys and values accumulate in fast memory, in float32
for all keys of one row and one key/value head, and are written when the row ends. The gradient of queries accumulates
per query tile. So each tile is visited once (five matrix products), and nothing larger than the gradients is ever
written.

Fast memory limits the keys of a row, at head_dim 64 and 128 alike (a register has 128 lanes): 44 thousand on v5p and
tpu7x, 109 thousand on v5e and v6e. Longer rows are cut into equal parts (`key_parts`): the kernel runs once for each
part of the keys, and the gradients of queries are summed between the runs in float32.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_walk import AHEAD, FOR_SPILLS, RING, TileStep, Walk, dot, launch, scratch_bytes
from llada_jax.attention.plan import Plan, part_chunks
from llada_jax.attention.tiles import Tiles


def key_parts(num_noisy: int, num_keys: int, tiles: Tiles, group: int, head_dim: int) -> int:
    """Returns into how many parts to cut the keys of a row so that their gradients fit the chip's fast memory."""
    room = pltpu.get_tpu_info().vmem_capacity_bytes - FOR_SPILLS
    parts = 1
    while True:
        chunks = sum(part_chunks(num_noisy, num_keys, tiles.chunk, parts))
        scratch = _scratch(tiles, group * tiles.queries, chunks, head_dim, jnp.float32, jnp.float32)
        if scratch_bytes(scratch) <= room:
            return parts
        parts += 1


def _scratch(tiles: Tiles, rows: int, chunks_per_row: int, head_dim: int, dtype, d_query_dtype) -> list:
    chunks, chunk = tiles.backward, tiles.chunk
    return [
        pltpu.VMEM((RING, rows, head_dim), dtype),
        pltpu.VMEM((RING, rows, head_dim), dtype),
        pltpu.VMEM((RING, 2, rows), jnp.float32),
        pltpu.VMEM((RING, 4, tiles.queries), jnp.int32),
        pltpu.VMEM((RING, chunks, chunk, head_dim), dtype),
        pltpu.VMEM((RING, chunks, chunk, head_dim), dtype),
        pltpu.VMEM((2, rows, head_dim), d_query_dtype),
        pltpu.VMEM((head_dim, rows), jnp.float32),
        pltpu.VMEM((chunks_per_row, chunk, head_dim), jnp.float32),
        pltpu.VMEM((chunks_per_row, chunk, head_dim), jnp.float32),
    ]


def backward(query, key, value, cotangent, statistics, plan: Plan, d_query_dtype, interpret=False):
    """Returns the gradients of (scaled query, key, value), each like its operand; key's and value's are float32.

    query, key, value as in the forward kernel; cotangent [kv_heads, query tiles, rows, head_dim]; statistics [kv_heads,
    query tiles, 2, rows] float32: the forward kernel's log-sums and the sums of output * cotangent over head_dim.
    The gradient is that of exp2: the caller applies the factors for log2(e) / sqrt(head_dim). Raises InputError if the
    gradients of all the plan's keys do not fit fast memory: key and value must then come in parts.
    """
    _, num_tiles, rows, head_dim = query.shape
    scratch = _scratch(plan.tiles, rows, plan.chunks_per_row, head_dim, query.dtype, d_query_dtype)
    results = [
        pltpu.HBM(query.shape, d_query_dtype),
        pltpu.HBM(key.shape, jnp.float32),
        pltpu.HBM(value.shape, jnp.float32),
    ]
    operands = [query, cotangent, statistics, plan.bounds, key, value]
    semaphores = (RING, RING, RING, RING, RING, RING, 2, 2)
    kernel, name = functools.partial(_kernel, plan, num_tiles), "block_diffusion_attention_backward"
    return launch(kernel, name, plan.backward_steps, plan.runs, operands, results, scratch, semaphores, interpret)


def _kernel(
    plan, num_tiles, steps, runs, query, cotangent, statistics, bounds, key, value, d_query, d_key, d_value,
    query_ring, cotangent_ring, statistics_ring, bounds_ring, key_ring, value_ring,
    d_query_pair, d_query_sum, d_key_sum, d_value_sum,
    query_done, cotangent_done, statistics_done, bounds_done, key_done, value_done, d_query_done, row_done,
):  # fmt: skip
    head = pl.program_id(0)
    walk = Walk(runs, plan, num_tiles, plan.tiles.backward)

    def tile_copies(tile):
        slot = tile % RING
        return (
            pltpu.make_async_copy(query.at[head, tile], query_ring.at[slot], query_done.at[slot]),
            pltpu.make_async_copy(cotangent.at[head, tile], cotangent_ring.at[slot], cotangent_done.at[slot]),
            pltpu.make_async_copy(statistics.at[head, tile], statistics_ring.at[slot], statistics_done.at[slot]),
            pltpu.make_async_copy(bounds.at[tile], bounds_ring.at[slot], bounds_done.at[slot]),
        )

    def result_copy(tile):
        slot = tile % 2
        return pltpu.make_async_copy(d_query_pair.at[slot], d_query.at[head, tile], d_query_done.at[slot])

    def start_chunks(step, index):
        sources, rings, semaphores = (key, value), (key_ring, value_ring), (key_done, value_done)
        walk.start_chunks(head, step, index % RING, sources, rings, semaphores)

    def wait_chunks(index):
        walk.wait_chunks(key, key_ring, key_done, index % RING)
        walk.wait_chunks(value, value_ring, value_done, index % RING)

    def start_tile(step):
        @pl.when((step.number == 0) & (step.tile < num_tiles))
        def _():
            for copy in tile_copies(step.tile):
                copy.start()

    def compute(step, following, last, index, masked):
        slot = step.tile % RING
        queries, cotangents = query_ring[slot], cotangent_ring[slot]
        keys = key_ring[index % RING].reshape(-1, key.shape[-1])
        values = value_ring[index % RING].reshape(-1, value.shape[-1])
        scores = dot(keys, queries, 1, 1)
        if masked:
            scores = walk.masked(scores, bounds_ring[slot], step)
        log_sum, projection = statistics_ring[slot, 0:1], statistics_ring[slot, 1:2]
        weights = jnp.exp2(scores - log_sum)
        d_weights = dot(values, cotangents, 1, 1)
        d_scores = (weights * (d_weights - projection)).astype(keys.dtype)
        d_values = dot(weights.astype(values.dtype), cotangents, 1, 0)
        d_keys = dot(d_scores, queries, 1, 0)
        d_query_sum[...] += dot(keys, d_scores, 0, 0)
        size = plan.tiles.chunk
        for i, (chunk, _, _) in enumerate(walk.step_chunks(step)):
            d_key_sum[chunk] += d_keys[i * size : (i + 1) * size]
            d_value_sum[chunk] += d_values[i * size : (i + 1) * size]
        # Among the arithmetic, where the scalar unit is idle.
        start_chunks(last, index + AHEAD)
        return walk.is_full(following), *walk.after(last)

    def finish_tile(tile):
        pl.when(tile >= 2)(lambda: result_copy(tile - 2).wait())
        d_query_pair[tile % 2] = d_query_sum[...].T.astype(d_query.dtype)
        d_query_sum[...] = jnp.zeros_like(d_query_sum)
        result_copy(tile).start()

    def reset_row():
        @pl.loop(0, plan.chunks_per_row)
        def _(chunk):
            d_key_sum[chunk] = jnp.zeros_like(d_key_sum[chunk])
            d_value_sum[chunk] = jnp.zeros_like(d_value_sum[chunk])

    def finish_row(row):
        row_chunks = pl.ds(row * plan.chunks_per_row, plan.chunks_per_row)
        copies = (
            pltpu.make_async_copy(d_key_sum, d_key.at[head, row_chunks], row_done.at[0]),
            pltpu.make_async_copy(d_value_sum, d_value.at[head, row_chunks], row_done.at[1]),
        )
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        reset_row()

    def body(index, carry):
        full, *flat = carry
        step, *later = (TileStep(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
        wait_chunks(index)

        @pl.when(step.number == 0)
        def _():
            for copy in tile_copies(step.tile):
                copy.wait()

        start_tile(later[-1])
        run = functools.partial(compute, step, later[0], later[-1], index)
        full, *new = lax.cond(full, lambda: run(masked=False), lambda: run(masked=True))
        last = walk.is_last(step)
        pl.when(last)(lambda: finish_tile(step.tile))
        row = walk.row(step.tile)
        # Past the end of the list is a row of its own, so that the last row ends as well.
        pl.when(last & (row != walk.row(step.tile + 1)))(lambda: finish_row(row))
        return full, *(x for s in later for x in s), *new

    first = walk.first()
    for index, step in enumerate(first[:AHEAD]):
        start_chunks(step, index)
        start_tile(step)
    d_query_sum[...] = jnp.zeros_like(d_query_sum)
    reset_row()
    lax.fori_loop(0, steps[0], body, (walk.is_full(first[0]), *(x for step in first for x in step)))
    for i in range(AHEAD):  # Copies of the steps past the end.
        wait_chunks(steps[0] + i)
    for tile in range(max(num_tiles - 2, 0), num_tiles):
        result_copy(tile).wait()
