"""The forward kernel: softmax(q k^T) v over the steps of a plan.

The loop is pipelined by hand: a step computes the scores of the next one, on the matrix units, while it takes the
exponentials of its own.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_walk import AHEAD, HIDDEN, RING, TileStep, Walk, dot, launch
from llada_jax.attention.plan import Plan


def forward(query, key, value, plan: Plan, interpret=False):
    """Returns the output and the log2 of the softmax's denominator of every query tile.

    query [kv_heads, query tiles, rows, head_dim], scaled by log2(e) / sqrt(head_dim); key, value [kv_heads, chunks,
    chunk, head_dim]. The output is like query, the denominators are float32 [kv_heads, query tiles, 1, rows]. For a
    query that sees nothing they are zeros and -HIDDEN.
    """
    kv_heads, num_tiles, rows, head_dim = query.shape
    chunks, chunk = plan.tiles.forward, plan.tiles.chunk
    keys = chunks * chunk
    scratch = [
        pltpu.VMEM((RING, rows, head_dim), query.dtype),
        pltpu.VMEM((RING, chunks, chunk, head_dim), key.dtype),
        pltpu.VMEM((RING, chunks, chunk, head_dim), value.dtype),
        pltpu.VMEM((RING, 4, plan.tiles.queries), jnp.int32),
        pltpu.VMEM((2, rows, head_dim), query.dtype),
        pltpu.VMEM((2, 1, rows), jnp.float32),
        pltpu.VMEM((keys, rows), jnp.float32),
        pltpu.VMEM((head_dim, rows), jnp.float32),
        pltpu.VMEM((1, rows), jnp.float32),
        pltpu.VMEM((1, rows), jnp.float32),
    ]
    results = [
        pltpu.HBM(query.shape, query.dtype),
        pltpu.HBM((kv_heads, num_tiles, 1, rows), jnp.float32),
    ]
    operands, semaphores = [query, key, value, plan.bounds], (RING, RING, RING, RING, 2, 2)
    kernel, name = functools.partial(_kernel, plan, num_tiles), "block_diffusion_attention_forward"
    return launch(kernel, name, plan.forward_steps, plan.runs, operands, results, scratch, semaphores, interpret)


def _kernel(
    plan, num_tiles, steps, runs, query, key, value, bounds, output, log_sum,
    query_ring, key_ring, value_ring, bounds_ring, output_pair, log_sum_pair, scores, accumulator, maximum, denominator,
    query_done, key_done, value_done, bounds_done, output_done, log_sum_done,
):  # fmt: skip
    head = pl.program_id(0)
    walk = Walk(runs, plan, num_tiles, plan.tiles.forward)

    def query_copy(tile):
        slot = tile % RING
        return pltpu.make_async_copy(query.at[head, tile], query_ring.at[slot], query_done.at[slot])

    def bounds_copy(tile):
        slot = tile % RING
        return pltpu.make_async_copy(bounds.at[tile], bounds_ring.at[slot], bounds_done.at[slot])

    def result_copies(tile):
        slot = tile % 2
        return (
            pltpu.make_async_copy(output_pair.at[slot], output.at[head, tile], output_done.at[slot]),
            pltpu.make_async_copy(log_sum_pair.at[slot], log_sum.at[head, tile], log_sum_done.at[slot]),
        )

    def start_chunks(step, index):
        sources, rings, semaphores = (key, value), (key_ring, value_ring), (key_done, value_done)
        walk.start_chunks(head, step, index % RING, sources, rings, semaphores)

    def start_tile(step):
        @pl.when((step.number == 0) & (step.tile < num_tiles))
        def _():
            query_copy(step.tile).start()
            bounds_copy(step.tile).start()

    def wait_for_scores(step, index):
        """Waits for what the scores of a step are made of."""
        walk.wait_chunks(key, key_ring, key_done, index % RING)

        @pl.when((step.number == 0) & (step.tile < num_tiles))
        def _():
            query_copy(step.tile).wait()

    def next_scores(step, index):
        keys = key_ring[index % RING].reshape(-1, key.shape[-1])
        return dot(keys, query_ring[step.tile % RING], 1, 1)

    def reset():
        maximum[...] = jnp.full_like(maximum, HIDDEN)
        denominator[...] = jnp.zeros_like(denominator)
        accumulator[...] = jnp.zeros_like(accumulator)

    def compute(step, following, last, index, masked):
        s = scores[...]
        if masked:
            s = walk.masked(s, bounds_ring[step.tile % RING], step)
        # At the end of the walk these are scores that nothing reads.
        upcoming = next_scores(following, index + 1)
        old = maximum[...]
        new = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
        weights = jnp.exp2(s - new)
        decay = jnp.exp2(old - new)
        values = value_ring[index % RING].reshape(-1, value.shape[-1])
        total = denominator[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        weighted = accumulator[...] * decay + dot(values, weights.astype(values.dtype), 0, 0)
        scores[...], maximum[...], denominator[...], accumulator[...] = upcoming, new, total, weighted
        # Among the arithmetic, where the scalar unit is idle.
        start_chunks(last, index + AHEAD)
        return walk.is_full(following), *walk.after(last)

    def finish(step):
        slot = step.tile % 2

        @pl.when(step.tile >= 2)
        def _():
            for copy in result_copies(step.tile - 2):
                copy.wait()

        saw = maximum[...] > HIDDEN / 2
        scale = jnp.where(saw, 1 / denominator[...], 0)
        output_pair[slot] = (accumulator[...] * scale).T.astype(output.dtype)
        log_sum_pair[slot] = jnp.where(saw, maximum[...] + jnp.log2(denominator[...]), -HIDDEN)
        for copy in result_copies(step.tile):
            copy.start()
        reset()

    def body(index, carry):
        full, *flat = carry
        step, following, *later = (TileStep(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
        walk.wait_chunks(value, value_ring, value_done, index % RING)
        pl.when(step.number == 0)(lambda: bounds_copy(step.tile).wait())
        wait_for_scores(following, index + 1)
        start_tile(later[-1])
        run = functools.partial(compute, step, following, later[-1], index)
        full, *new = lax.cond(full, lambda: run(masked=False), lambda: run(masked=True))
        pl.when(walk.is_last(step))(lambda: finish(step))
        return full, *(x for s in (following, *later) for x in s), *new

    first = walk.first()
    for index, step in enumerate(first[:AHEAD]):
        start_chunks(step, index)
        start_tile(step)
    reset()
    wait_for_scores(first[0], 0)
    scores[...] = next_scores(first[0], 0)
    lax.fori_loop(0, steps[0], body, (walk.is_full(first[0]), *(x for step in first for x in step)))
    # Copies of the steps past the end: scores were waited for once, values not.
    for i in range(AHEAD):
        walk.wait_chunks(value, value_ring, value_done, (steps[0] + i) % RING)
    for i in range(1, AHEAD):
        walk.wait_chunks(key, key_ring, key_done, (steps[0] + i) % RING)
    for tile in range(max(num_tiles - 2, 0), num_tiles):
        for copy in result_copies(tile):
            copy.wait()
