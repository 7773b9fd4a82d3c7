"""Projections of decoding: a TPU kernel multiplies with one layer of stacked weights, which it reads in place.

    project_heads   queries, keys and values of RMSNorm(x): x W, of which heads of queries and keys are normalised and
                    rotated; keys and values come head by head, as the cache has them
    project         x W

Rows stay in fast memory, a block at a time; tiles of the weights' columns stream past them once per block, two ahead of
the arithmetic. The cores of a device share out the tiles. No gradient.
"""

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.decoding.cached_kernel import ALIGNED, LANES
from llada_jax.attention.kernel_rotary import tile_rotary
from llada_jax.attention.kernel_walk import dot, scratch_bytes
from llada_jax.attention.rotary import QueryKeyRotary

NAME = "decoding_projection"
MOST_ROWS = 512  # of a block
MOST_COLUMNS = 512  # of a tile
AHEAD = 2  # tiles that are on their way
FOR_SPILLS = 8 << 20  # bytes of fast memory for the compiler


class Tiling(NamedTuple):
    """rows: of a block. columns: of a tile."""

    rows: int
    columns: int


def tiling(
    batch: int, positions: int, inputs: int, outputs: Sequence[int], unit: int, dtype, interpret: bool = False
) -> Tiling | None:
    """The largest blocks and tiles that fit this chip. None if none do, or if sizes are no whole registers.

    batch, positions, inputs: sizes of x. outputs: columns of each weight, a multiple of `unit`, which stays whole.
    interpret: no memory has an end.
    """
    if positions % ALIGNED or inputs % LANES or unit % LANES:
        return None
    most = math.gcd(*outputs) // unit
    columns = [unit * n for n in range(most, 0, -1) if most % n == 0 and unit * n <= max(MOST_COLUMNS, unit)]
    rows = [positions * n for n in range(batch, 0, -1) if batch % n == 0 and positions * n <= max(MOST_ROWS, positions)]
    capacity = math.inf if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
    for found in (Tiling(row, column) for column in columns for row in rows):
        buffers = scratch_bytes(_scratch(found, inputs, dtype).values())
        blocks = 2 * found.rows * (inputs * jnp.dtype(dtype).itemsize + 2 * LANES * 4)
        if buffers + blocks + FOR_SPILLS <= capacity:
            return found
    return None


def project_heads(
    x: jax.Array, norm: jax.Array, stacks: Sequence[jax.Array], layer: jax.Array, rotary: QueryKeyRotary, head_dim: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns queries [batch, positions, heads * head_dim], and keys and values [batch, kv_heads, positions, head_dim].

    x [batch, positions, embed], not yet normalised; norm [embed]: the weight of its RMSNorm, whose epsilon is the
    rotary's. stacks: query, key and value [layers, embed, heads * head_dim]. layer: int32 scalar. interpret: on any
    device, slowly. Sizes must be such that `tiling` finds one.
    """
    batch, positions, embed = x.shape
    widths = [stack.shape[2] for stack in stacks]
    sizes = tiling(batch, positions, embed, widths, head_dim, x.dtype, interpret)
    by_head = [jax.ShapeDtypeStruct((batch, width // head_dim, positions, head_dim), x.dtype) for width in widths[1:]]
    results = [jax.ShapeDtypeStruct((batch * positions, widths[0]), x.dtype), *by_head]
    norms = [rotary.query.weight, rotary.key.weight]
    vectors = dict(norm=norm[None].astype(jnp.float32))
    if norms[0] is not None:
        vectors["norms"] = jnp.stack(norms).astype(jnp.float32)
    angles = dict(cos=rotary.key.cos, sin=rotary.key.sin)
    angles = {name: angle.reshape(batch * positions, -1) for name, angle in angles.items()}
    query, key, value = _launch(
        x.reshape(-1, embed), angles, vectors, stacks, layer, results, sizes, rotary.key, head_dim, interpret
    )
    return query.reshape(batch, positions, -1), key, value


def project(x: jax.Array, stack: jax.Array, layer: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns x W [batch, positions, out], with x [batch, positions, in] and W = stack[layer] [in, out]."""
    batch, positions, inputs = x.shape
    sizes = tiling(batch, positions, inputs, [stack.shape[2]], LANES, x.dtype, interpret)
    results = [jax.ShapeDtypeStruct((batch * positions, stack.shape[2]), x.dtype)]
    (y,) = _launch(x.reshape(-1, inputs), {}, {}, [stack], layer, results, sizes, None, LANES, interpret)
    return y.reshape(batch, positions, -1)


def _scratch(sizes: Tiling, inputs: int, dtype) -> dict[str, pltpu.VMEM]:
    return dict(
        normal=pltpu.VMEM((sizes.rows, inputs), dtype),
        ring=pltpu.VMEM((AHEAD + 1, inputs, sizes.columns), dtype),
        stage=pltpu.VMEM((2, sizes.rows, sizes.columns), dtype),
    )


def _launch(x, angles, vectors, stacks, layer, results, sizes: Tiling, rotary, head_dim, interpret):
    """x [rows, in]; angles: arrays [rows, ...]; vectors: arrays that every block needs whole."""
    rows, inputs = x.shape
    interpret = pltpu.InterpretParams() if interpret else False
    cores = 2 if interpret else pltpu.get_tpu_info().num_cores
    scratch = _scratch(sizes, inputs, x.dtype)
    blocks = dict(x=x) | angles
    of_block = [
        pl.BlockSpec((sizes.rows, array.shape[1]), lambda core, block, *_: (block, 0)) for array in blocks.values()
    ]
    whole = [pl.BlockSpec(vector.shape, lambda *_: (0, 0)) for vector in vectors.values()]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    numbers = range(len(stacks))
    names = [*blocks, *vectors, *(f"stack{i}" for i in numbers), *(f"result{i}" for i in numbers), *scratch]
    references = collections.namedtuple("References", [*names, "ring_done", "stage_done"])
    if not interpret:
        stacks = [pltpu.with_memory_space_constraint(stack, pltpu.HBM) for stack in stacks]
    tiles = [stack.shape[2] // sizes.columns for stack in stacks]
    return pl.pallas_call(
        lambda layer, *refs: _Block(layer[0], references(*refs), tiles, rotary, head_dim).run(),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, rows // sizes.rows),
            in_specs=[*of_block, *whole, *[hbm] * len(stacks)],
            out_specs=[hbm] * len(results),
            scratch_shapes=[
                *scratch.values(), pltpu.SemaphoreType.DMA((AHEAD + 1,)), pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=None if interpret else pltpu.get_tpu_info().vmem_capacity_bytes - (1 << 20),
        ),
        interpret=interpret,
        name=NAME,
    )(jnp.reshape(layer, 1), *blocks.values(), *vectors.values(), *stacks)  # fmt: skip


class _Block:
    """The kernel of a block of rows on one core. Step n of all blocks is the core's tile n % mine, in block n // mine.

    tiles: of each stack. refs: operands, results, buffers and semaphores, by name.
    """

    def __init__(self, layer, refs, tiles, rotary, head_dim):
        self.layer, self.refs, self.rotary, self.head_dim = layer, refs, rotary, head_dim
        self.core, self.cores = pl.program_id(0), pl.num_programs(0)
        self.block, blocks = pl.program_id(1), pl.num_programs(1)
        self.rows, self.columns = refs.stage.shape[1:]
        self.firsts = [sum(tiles[:i]) for i in range(len(tiles) + 1)]
        self.mine = (self.firsts[-1] - self.core + self.cores - 1) // self.cores
        self.steps = self.mine * blocks

    def run(self):
        refs = self.refs

        @pl.when(self.block == 0)
        def _():
            for step in range(AHEAD):
                pl.when(step < self.steps)(functools.partial(self.start, step))

        if self.rotary is not None:
            self.normalise()
        lax.fori_loop(0, self.mine, self.multiply, None)

        @pl.when((self.block + 1) * self.mine == self.steps)
        def _():
            for ago in (1, 2):
                place = (self.steps - ago) % 2
                pl.when(self.steps >= ago)(functools.partial(self.wait, refs.stage, refs.stage_done, place))

    def normalise(self):
        """normal <- RMSNorm(x), rounded as rotary.rms_norm does."""
        refs, dtype = self.refs, self.refs.normal.dtype

        size = math.gcd(self.rows, 64)

        def of_group(group, _):
            rows = pl.ds(pl.multiple_of(group * size, ALIGNED), size)
            x = refs.x[rows].astype(jnp.float32)
            inverse = lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + self.rotary.eps)
            refs.normal[rows] = ((x * inverse).astype(dtype).astype(jnp.float32) * refs.norm[...]).astype(dtype)

        lax.fori_loop(0, self.rows // size, of_group, None)

    def of_stack(self, tile, function):
        """Calls function(number of the stack, tile within it) for the stack that the tile is of."""
        for i, (first, end) in enumerate(zip(self.firsts, self.firsts[1:], strict=False)):
            pl.when((tile >= first) & (tile < end))(functools.partial(function, i, tile - first))

    def tile(self, step):
        return self.core + step % self.mine * self.cores

    def start(self, step):
        refs, slot = self.refs, step % (AHEAD + 1)

        def copy(i, tile):
            columns = pl.ds(pl.multiple_of(tile * self.columns, LANES), self.columns)
            source = getattr(refs, f"stack{i}").at[self.layer, :, columns]
            pltpu.make_async_copy(source, refs.ring.at[slot], refs.ring_done.at[slot]).start()

        self.of_stack(self.tile(step), copy)

    @staticmethod
    def wait(buffers, done, slot):
        """For the copies into, or out of, a whole buffer."""
        pltpu.make_async_copy(buffers.at[slot], buffers.at[slot], done.at[slot]).wait()

    def multiply(self, n, _):
        refs, step = self.refs, self.block * self.mine + n
        pl.when(step + AHEAD < self.steps)(lambda: self.start(step + AHEAD))
        slot, place = step % (AHEAD + 1), step % 2
        self.wait(refs.ring, refs.ring_done, slot)
        pl.when(step >= 2)(lambda: self.wait(refs.stage, refs.stage_done, place))
        tile = self.tile(step)
        if self.rotary is None:
            refs.stage[place] = dot(refs.x[...], refs.ring[slot], 1, 0).astype(refs.stage.dtype)
        else:
            self.rotated(tile, slot, place)
        self.of_stack(tile, functools.partial(self.send, place))

    def rotated(self, tile, slot, place):
        """stage <- the heads of a tile; those of queries and keys are normalised and rotated, while the matrix units
        work at the next one.
        """
        refs, tables = self.refs, [self.refs.cos, self.refs.sin]
        if self.rotary.weight is not None:
            tables.append(jnp.where(tile < self.firsts[1], refs.norms[0:1], refs.norms[1:2]))
        rotary = tile_rotary(self.rotary, tables, slice(None), 1, 1.0, self.head_dim)
        for first in range(0, self.columns, self.head_dim):
            head = slice(first, first + self.head_dim)
            y = dot(refs.normal[...], refs.ring[slot, :, head], 1, 0).astype(refs.stage.dtype)
            # In float32 sums over channels cross lanes, for which the matrix units need not stop here.
            turned = rotary.forward(y.astype(jnp.float32)).astype(y.dtype)
            refs.stage[place, :, head] = jnp.where(tile < self.firsts[2], turned, y)

    def send(self, place, i, tile):
        """Starts the copies of the stage into the i-th result."""
        refs, result = self.refs, getattr(self.refs, f"result{i}")

        def copy(source, target):
            pltpu.make_async_copy(source, target, refs.stage_done.at[place]).start()

        if i == 0:
            rows = pl.ds(pl.multiple_of(self.block * self.rows, ALIGNED), self.rows)
            columns = pl.ds(pl.multiple_of(tile * self.columns, LANES), self.columns)
            return copy(refs.stage.at[place], result.at[rows, columns])
        positions, heads = result.shape[2], self.columns // self.head_dim
        for row, head in itertools.product(range(self.rows // positions), range(heads)):
            of_row, of_head = pl.ds(row * positions, positions), pl.ds(head * self.head_dim, self.head_dim)
            target = result.at[self.block * (self.rows // positions) + row, tile * heads + head]
            copy(refs.stage.at[place, of_row, of_head], target)
