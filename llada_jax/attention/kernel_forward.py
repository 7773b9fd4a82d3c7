"""The forward kernel: softmax(q k^T) v over the steps of a plan.

The loop is pipelined by hand: a step computes the scores of the next one, on the matrix units, while it takes the
exponentials of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_walk import AHEAD, HIDDEN, RING, TileStep, Walk, dot, launch
from llada_jax.attention.plan import Plan


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, plan: Plan, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log2 of the softmax's denominator of every query tile.

    query [kv_heads, query tiles, rows, head_dim], scaled by log2(e) / sqrt(head_dim); key, value [kv_heads, chunks,
    chunk, head_dim]. The output is like query, the denominators are float32 [kv_heads, query tiles, 1, rows]. For a
    query that sees nothing they are zeros and -HIDDEN.
    """
    kv_heads, num_tiles, rows, head_dim = query.shape
    chunks, chunk = plan.tiles.forward, plan.tiles.chunk
    operands = dict(query=query, key=key, value=value, bounds=plan.bounds)
    results = dict(
        output=pltpu.HBM(query.shape, query.dtype),
        log_sum=pltpu.HBM((kv_heads, num_tiles, 1, rows), jnp.float32),
    )
    scratch = dict(
        query_ring=pltpu.VMEM((RING, rows, head_dim), query.dtype),
        key_ring=pltpu.VMEM((RING, chunks, chunk, head_dim), key.dtype),
        value_ring=pltpu.VMEM((RING, chunks, chunk, head_dim), value.dtype),
        bounds_ring=pltpu.VMEM((RING, 4, plan.tiles.queries), jnp.int32),
        output_pair=pltpu.VMEM((2, rows, head_dim), query.dtype),
        log_sum_pair=pltpu.VMEM((2, 1, rows), jnp.float32),
        scores=pltpu.VMEM((chunks * chunk, rows), jnp.float32),
        accumulator=pltpu.VMEM((head_dim, rows), jnp.float32),
        maximum=pltpu.VMEM((1, rows), jnp.float32),
        denominator=pltpu.VMEM((1, rows), jnp.float32),
    )
    semaphores = dict(
        query_done=RING, key_done=RING, value_done=RING, bounds_done=RING, output_done=2, log_sum_done=2
    )  # fmt: skip

    def kernel(steps, runs, refs):
        _Forward(plan, num_tiles, runs, refs).run(steps)

    name = "block_diffusion_attention_forward"
    return launch(kernel, name, plan.forward_steps, plan, operands, results, scratch, semaphores, interpret)


class _Forward:
    """The kernel of one key/value head. refs: the operands, results, scratch buffers and semaphores of `forward`."""

    def __init__(self, plan: Plan, num_tiles: int, runs, refs):
        self.refs, self.num_tiles, self.head = refs, num_tiles, pl.program_id(0)
        self.walk = Walk(runs, plan, num_tiles, plan.tiles.forward)

    def query_copy(self, tile):
        refs = self.refs
        slot = tile % RING
        return pltpu.make_async_copy(refs.query.at[self.head, tile], refs.query_ring.at[slot], refs.query_done.at[slot])

    def bounds_copy(self, tile):
        refs = self.refs
        slot = tile % RING
        return pltpu.make_async_copy(refs.bounds.at[tile], refs.bounds_ring.at[slot], refs.bounds_done.at[slot])

    def result_copies(self, tile):
        refs = self.refs
        slot = tile % 2
        output, log_sum = (result.at[self.head, tile] for result in (refs.output, refs.log_sum))
        return (
            pltpu.make_async_copy(refs.output_pair.at[slot], output, refs.output_done.at[slot]),
            pltpu.make_async_copy(refs.log_sum_pair.at[slot], log_sum, refs.log_sum_done.at[slot]),
        )

    def start_chunks(self, step, index):
        refs = self.refs
        sources, rings = (refs.key, refs.value), (refs.key_ring, refs.value_ring)
        self.walk.start_chunks(self.head, step, index % RING, sources, rings, (refs.key_done, refs.value_done))

    def start_tile(self, step):
        @pl.when((step.number == 0) & (step.tile < self.num_tiles))
        def _():
            self.query_copy(step.tile).start()
            self.bounds_copy(step.tile).start()

    def wait_for_scores(self, step, index):
        """Waits for the keys and, at the start of a tile, the queries of a step."""
        refs = self.refs
        self.walk.wait_chunks(refs.key, refs.key_ring, refs.key_done, index % RING)

        @pl.when((step.number == 0) & (step.tile < self.num_tiles))
        def _():
            self.query_copy(step.tile).wait()

    def next_scores(self, step, index):
        refs = self.refs
        keys = refs.key_ring[index % RING].reshape(-1, refs.key.shape[-1])
        return dot(keys, refs.query_ring[step.tile % RING], 1, 1)

    def reset(self):
        refs = self.refs
        refs.maximum[...] = jnp.full_like(refs.maximum, HIDDEN)
        refs.denominator[...] = jnp.zeros_like(refs.denominator)
        refs.accumulator[...] = jnp.zeros_like(refs.accumulator)

    def compute(self, step, following, last, index, masked):
        refs = self.refs
        s = refs.scores[...]
        if masked:
            s = self.walk.masked(s, refs.bounds_ring[step.tile % RING], step)
        # At the end of the walk these are scores that nothing reads.
        upcoming = self.next_scores(following, index + 1)
        old = refs.maximum[...]
        new = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
        weights = jnp.exp2(s - new)
        decay = jnp.exp2(old - new)
        values = refs.value_ring[index % RING].reshape(-1, refs.value.shape[-1])
        total = refs.denominator[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        weighted = refs.accumulator[...] * decay + dot(values, weights.astype(values.dtype), 0, 0)
        refs.scores[...], refs.maximum[...] = upcoming, new
        refs.denominator[...], refs.accumulator[...] = total, weighted
        # Among the arithmetic, where the scalar unit is idle.
        self.start_chunks(last, index + AHEAD)
        return self.walk.is_full(following), *self.walk.after(last)

    def finish(self, step):
        refs = self.refs
        slot = step.tile % 2

        @pl.when(step.tile >= 2)
        def _():
            for copy in self.result_copies(step.tile - 2):
                copy.wait()

        saw = refs.maximum[...] > HIDDEN / 2
        scale = jnp.where(saw, 1 / refs.denominator[...], 0)
        refs.output_pair[slot] = (refs.accumulator[...] * scale).T.astype(refs.output.dtype)
        refs.log_sum_pair[slot] = jnp.where(saw, refs.maximum[...] + jnp.log2(refs.denominator[...]), -HIDDEN)
        for copy in self.result_copies(step.tile):
            copy.start()
        self.reset()

    def body(self, index, carry):
        refs = self.refs
        full, *flat = carry
        step, following, *later = (TileStep(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
        self.walk.wait_chunks(refs.value, refs.value_ring, refs.value_done, index % RING)
        pl.when(step.number == 0)(lambda: self.bounds_copy(step.tile).wait())
        self.wait_for_scores(following, index + 1)
        self.start_tile(later[-1])
        run = functools.partial(self.compute, step, following, later[-1], index)
        full, *new = lax.cond(full, lambda: run(masked=False), lambda: run(masked=True))
        pl.when(self.walk.is_last(step))(lambda: self.finish(step))
        return full, *(x for s in (following, *later) for x in s), *new

    def run(self, steps):
        refs = self.refs
        first = self.walk.first()
        for index, step in enumerate(first[:AHEAD]):
            self.start_chunks(step, index)
            self.start_tile(step)
        self.reset()
        self.wait_for_scores(first[0], 0)
        refs.scores[...] = self.next_scores(first[0], 0)
        lax.fori_loop(0, steps[0], self.body, (self.walk.is_full(first[0]), *(x for step in first for x in step)))
        # Copies of the steps past the end: scores were waited for once, values not.
        for i in range(AHEAD):
            self.walk.wait_chunks(refs.value, refs.value_ring, refs.value_done, (steps[0] + i) % RING)
        for i in range(1, AHEAD):
            self.walk.wait_chunks(refs.key, refs.key_ring, refs.key_done, (steps[0] + i) % RING)
        for tile in range(max(self.num_tiles - 2, 0), self.num_tiles):
            for copy in self.result_copies(tile):
                copy.wait()
