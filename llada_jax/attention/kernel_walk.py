"""What the forward and backward kernels share: the walk over a plan's steps, the copies it starts, and the mask.

One grid step is one key/value head. In it a single loop runs over all steps of all query tiles, so that copies and
matrix products of the next steps overlap with the arithmetic of this one across tile borders. Scores are transposed,
[keys, rows]: a query's maximum, sum and interval are then row vectors, and no reduction crosses lanes.
"""

import collections
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.plan import CLEAN_OFFSET, COLUMNS, COUNT, NOISY_COUNT, NOISY_OFFSET, ROW, Plan, is_full
from llada_jax.errors import InputError

AHEAD = 3  # a step's copies start this many steps before it ...
RING = AHEAD + 1  # ... into a ring of this many buffers
FOR_SPILLS = 16 << 20  # bytes of fast memory for the compiler's spills; where there is little, a quarter of it
HIDDEN = -1e30  # score of a masked pair: finite, so that a row that sees nothing yet has finite differences


class TileStep(NamedTuple):
    """A step of the walk: its query tile and its number within it, int32 scalars. tile == num_tiles: past the end."""

    tile: jax.Array
    number: jax.Array


class Walk:
    """The steps over a plan, `chunks` chunks of keys each. runs: Plan.runs, in scalar memory."""

    def __init__(self, runs, plan: Plan, num_tiles: int, chunks: int):
        self.runs, self.num_tiles, self.chunks, self.plan = runs, num_tiles, chunks, plan
        self.num_rows = num_tiles // plan.tiles_per_row

    def column(self, tile, column: int):
        return self.runs[tile * COLUMNS + column]

    def row(self, tile):
        return self.column(tile, ROW)

    def first(self) -> list[TileStep]:
        """The first RING steps."""
        steps = [TileStep(jnp.int32(0), jnp.int32(0))]
        while len(steps) < RING:
            steps.append(self.after(steps[-1]))
        return steps

    def after(self, step: TileStep) -> TileStep:
        same = (step.number + 1) * self.chunks < self.column(step.tile, COUNT)
        tile = jnp.where(same, step.tile, jnp.minimum(step.tile + 1, self.num_tiles))
        return TileStep(tile, jnp.where(same, step.number + 1, 0))

    def is_last(self, step: TileStep):
        return (step.number + 1) * self.chunks >= self.column(step.tile, COUNT)

    def is_full(self, step: TileStep):
        return is_full(lambda column: self.column(step.tile, column), step.number * self.chunks, self.chunks)

    def step_chunks(self, step: TileStep):
        """Yields per chunk of a step: its number in the row, whether its keys are noisy, whether it is in the run."""
        columns = (COUNT, NOISY_COUNT, NOISY_OFFSET, CLEAN_OFFSET)
        count, noisy_count, noisy_offset, clean_offset = (self.column(step.tile, column) for column in columns)
        for i in range(self.chunks):
            position = step.number * self.chunks + i
            inside = position < count
            position = jnp.minimum(position, jnp.maximum(count - 1, 0))
            noisy = position < noisy_count
            yield position + jnp.where(noisy, noisy_offset, clean_offset), noisy, inside

    def start_chunks(self, head, step: TileStep, slot, sources, rings, semaphores):
        """Starts copying the step's chunks of sources [heads, chunks, chunk, head_dim] into rings at slot."""
        # Past the end of the list: some chunk, so that no copy needs a branch.
        row = jnp.minimum(self.row(step.tile), self.num_rows - 1) * self.plan.chunks_per_row
        chunks = [row + chunk for chunk, _, _ in self.step_chunks(step)]
        for source, ring, done in zip(sources, rings, semaphores, strict=True):
            for i, chunk in enumerate(chunks):
                pltpu.make_async_copy(source.at[head, chunk], ring.at[slot, i], done.at[slot]).start()

    def wait_chunks(self, source, ring, done, slot):
        """Waits for all of the step's chunks at once."""
        source = source.at[0, pl.ds(0, self.chunks)]
        pltpu.make_async_copy(source, ring.at[slot], done.at[slot]).wait()

    def masked(self, scores, bounds, step: TileStep):
        """scores [keys, rows] with HIDDEN where the row does not see the key; bounds [4, tile] int32."""
        chunk_size, tile = self.plan.tiles.chunk, bounds.shape[1]
        heads = scores.shape[1] // tile
        if tile % 128:  # Heads do not start at whole registers: one mask for all rows instead of one per position.
            bounds, tile, heads = jnp.concatenate([bounds] * heads, axis=1), scores.shape[1], 1
        key = lax.broadcasted_iota(jnp.int32, (chunk_size, tile), 0)
        parts = []
        for i, (chunk, noisy, inside) in enumerate(self.step_chunks(step)):
            # A chunk past the end of the run is moved out of every interval.
            base = jnp.where(inside, chunk * chunk_size, jnp.iinfo(jnp.int32).max // 2)
            start = jnp.where(noisy, bounds[0:1], bounds[2:3]) - base
            end = jnp.where(noisy, bounds[1:2], bounds[3:4]) - base
            visible = (key >= start) & (key < end)
            part = scores[i * chunk_size : (i + 1) * chunk_size]
            columns = [part[:, h * tile : (h + 1) * tile] for h in range(heads)]
            parts.append(jnp.concatenate([jnp.where(visible, column, HIDDEN) for column in columns], axis=1))
        return jnp.concatenate(parts, axis=0)


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """a . b over one dimension of each, accumulated in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def launch(
    kernel: Callable,
    name: str,
    steps: jax.Array,
    plan: Plan,
    operands: dict[str, jax.Array],
    results: dict[str, pltpu.HBM],
    scratch: dict[str, pltpu.VMEM],
    semaphores: dict[str, int],
    interpret,
) -> list[jax.Array]:
    """Runs `kernel(steps, runs, refs)` once per key/value head (the leading axis of the operands); returns its results.

    steps, runs: Plan.forward_steps or .backward_steps and Plan.runs, in scalar memory. refs: a named tuple of the
    references to operands, results, scratch buffers and arrays of semaphores, under the names that they have here.
    results: shapes and dtypes. scratch: buffers in fast memory. semaphores: the size of each array of them.

    Operands and results stay in HBM: XLA would move some into fast memory, and the kernel's copies would then be loops
    of vector moves.
    """
    arrays = list(operands.values())
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    references = collections.namedtuple("References", [*operands, *results, *scratch, *semaphores])
    buffers = list(scratch.values())
    return pl.pallas_call(
        lambda steps, runs, *refs: kernel(steps, runs, references(*refs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(arrays[0].shape[0],),
            in_specs=[hbm] * len(operands),
            out_specs=[hbm] * len(results),
            scratch_shapes=buffers + [pltpu.SemaphoreType.DMA((size,)) for size in semaphores.values()],
        ),
        out_shape=list(results.values()),
        compiler_params=_compiler_params(buffers, interpret),
        interpret=interpret,
        name=name,
    )(steps, plan.runs, *arrays)


def scratch_bytes(scratch) -> int:
    """Returns the bytes of fast memory that buffers take; their last axis fills whole registers of 128 lanes."""

    def size(buffer):
        *major, lanes = buffer.shape
        return math.prod(major) * -(-lanes // 128) * 128 * jnp.dtype(buffer.dtype).itemsize

    return sum(map(size, scratch))


def room_for_scratch() -> int:
    """Returns the bytes of the chip's fast memory that scratch may take."""
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    return capacity - min(FOR_SPILLS, capacity // 4)


def _compiler_params(scratch, interpret):
    """Cores split the key/value heads. Raises InputError if the scratch does not fit fast memory."""
    limit = None if interpret else _fast_memory(scratch_bytes(scratch))
    # Addresses are right by construction (interpret mode raises otherwise). Checks would split every block of copies.
    return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit, disable_bounds_checks=True)


def _fast_memory(scratch: int) -> int:
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    limit = scratch + capacity - room_for_scratch()
    if limit > capacity:
        raise InputError(
            f"attention='kernel': the gradients of a row's keys need {limit >> 20} MiB of fast memory, the chip has "
            f"{capacity >> 20}; make the plan in more parts"
        )
    return limit
