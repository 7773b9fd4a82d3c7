"""Operands and results of the attention kernels: heads are normalised, rotated, scaled and cut into tiles.

Projections work on rows, [batch, length, heads, head_dim], with heads side by side in memory. The attention kernels
work on tiles, [kv_heads, tiles, rows, head_dim]; the rows of a tile are heads x positions. Each function here converts
one to the other in one pass over HBM, and does RMSNorm and rotation (rotary.py) on the way, in float32, rounded once.
XLA takes a dozen passes for that: the halves of a rotation make it transpose every head and back.

Arguments in common. name: of the operand; a rehearsal finds the kernel's cost by it. tile: positions per query tile or
chunk of keys, a divisor of the length. interpret: pltpu.InterpretParams() runs a kernel on any device.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_rotary import tile_rotary
from llada_jax.attention.rotary import RotaryNorm

_STEP_BYTES = 2**20  # bytes of rows per grid step: copies are long, and several steps fit fast memory


def tiles_of_rows(
    x: jax.Array,
    kv_heads: int,
    tile: int,
    name: str,
    rotary: RotaryNorm | None = None,
    scale: float = 1.0,
    interpret=False,
) -> jax.Array:
    """Returns rotary(x) * scale in tiles: x [batch, length, heads, head_dim] -> [kv_heads, tiles, rows, head_dim]."""
    cut = _Cut(x.shape, kv_heads, tile, x.dtype.itemsize)

    def kernel(*refs):
        *rotary_refs, rows, tiles = refs
        for t in range(cut.tiles_a_step):
            rotated = tile_rotary(rotary, rotary_refs, cut.positions(t), cut.group, scale, cut.head_dim)
            for h in range(kv_heads):
                tiles[h, t] = rotated.forward(cut.heads_of(rows, t, h)).astype(tiles.dtype)

    inputs = [*cut.in_rotary(rotary), cut.in_rows(x)]
    return cut.call(kernel, f"{name}_tiles", inputs, [cut.out_tiles(x.dtype)], interpret)[0]


def rows_of_tiles(
    tiles: jax.Array,
    x: jax.Array,
    tile: int,
    name: str,
    rotary: RotaryNorm | None = None,
    scale: float = 1.0,
    interpret=False,
):
    """Returns the gradients of x and of rotary.weight (float32 [head_dim], None without one).

    tiles: gradient of the result of tiles_of_rows(x, ...). Without a rotation this is the inverse of tiles_of_rows
    times scale, and only the shape and dtype of x matter.
    """
    shape, dtype = x.shape, x.dtype
    cut = _Cut(shape, tiles.shape[0], tile, dtype.itemsize)
    normed = rotary is not None and rotary.weight is not None

    def kernel(*refs):
        rotary_refs, (d_tiles, *rows) = refs[:first], refs[first : len(inputs)]
        d_rows, *d_weight = refs[len(inputs) :]
        sums = 0.0
        for t in range(cut.tiles_a_step):
            rotated = tile_rotary(rotary, rotary_refs, cut.positions(t), cut.group, scale, cut.head_dim)
            for h in range(cut.kv_heads):
                own = cut.heads_of(rows[0], t, h) if normed else None
                d_heads, part = rotated.backward(d_tiles[h, t].astype(dtype), own)
                cut.set_heads(d_rows, t, h, d_heads.astype(dtype))
                sums += part
        for out in d_weight:
            out[0] = sums.sum(axis=0, keepdims=True)

    rotary_refs = cut.in_rotary(rotary)
    first, inputs = len(rotary_refs), [*rotary_refs, cut.in_tiles(tiles), *([cut.in_rows(x)] if normed else [])]
    outputs = [cut.out_rows(dtype)] + [cut.out_sums()] * normed
    d_rows, *d_weight = cut.call(kernel, f"{name}_rows", inputs, outputs, interpret)
    return d_rows.reshape(shape), d_weight[0].sum(axis=(0, 1)) if d_weight else None


def cotangent_tiles(output: jax.Array, cotangent: jax.Array, log_sum: jax.Array, tile: int, interpret=False):
    """Returns the cotangent's tiles and the statistics that the backward kernel takes.

    output, cotangent [batch, queries, heads, head_dim]; log_sum [kv_heads, query tiles, 1, rows].
    """
    cut = _Cut(output.shape, log_sum.shape[0], tile, 2 * output.dtype.itemsize)

    def kernel(log_sum, output, cotangent, tiles, statistics):
        for t in range(cut.tiles_a_step):
            for h in range(cut.kv_heads):
                d_heads = cut.heads_of(cotangent, t, h)
                tiles[h, t] = d_heads
                product = cut.heads_of(output, t, h).astype(jnp.float32) * d_heads.astype(jnp.float32)
                statistics[h, t, 0:1] = log_sum[h, t]
                statistics[h, t, 1:2] = product.T.sum(axis=0, keepdims=True)

    inputs = [cut.in_statistics(log_sum), cut.in_rows(output), cut.in_rows(cotangent)]
    outputs = [cut.out_tiles(cotangent.dtype), cut.out_statistics(2)]
    return cut.call(kernel, "attention_cotangent_tiles", inputs, outputs, interpret)


def steps(shape: Sequence[int], kv_heads: int, tile: int, itemsize: int) -> int:
    """Returns the grid steps of a kernel here, for rows of this shape with `itemsize` bytes per element."""
    return _Cut(shape, kv_heads, tile, itemsize).steps


class _Cut:
    """How rows are cut into tiles, and both into blocks, one per grid step."""

    def __init__(self, shape: Sequence[int], kv_heads: int, tile: int, itemsize: int):
        batch, length, self.num_heads, self.head_dim = shape
        self.kv_heads, self.tile, self.group = kv_heads, tile, self.num_heads // kv_heads
        self.width, self.num_tiles = self.num_heads * self.head_dim, batch * length // tile
        self.tiles_a_step = 1
        while self.num_tiles % (more := 2 * self.tiles_a_step) == 0 and (
            more * tile * self.width * itemsize <= _STEP_BYTES
        ):
            self.tiles_a_step = more

    @property
    def steps(self) -> int:
        return self.num_tiles // self.tiles_a_step

    def positions(self, t: int) -> slice:
        return slice(t * self.tile, (t + 1) * self.tile)

    def heads_of(self, rows, t: int, h: int) -> jax.Array:
        """The heads of tile t of a block of rows that go with key/value head h, one after the other."""
        return jnp.concatenate([rows[self._slices(t, h, i)] for i in range(self.group)], axis=0)

    def set_heads(self, rows, t: int, h: int, heads: jax.Array) -> None:
        for i in range(self.group):
            rows[self._slices(t, h, i)] = heads[i * self.tile : (i + 1) * self.tile]

    def _slices(self, t: int, h: int, i: int):
        first = (h * self.group + i) * self.head_dim
        return self.positions(t), slice(first, first + self.head_dim)

    # (array, the block of a step) of each operand, (shape, block) of each result.

    def in_rows(self, x: jax.Array):
        return x.reshape(-1, self.width), self._row_block(self.width)

    def in_tiles(self, tiles: jax.Array):
        return tiles, self._tile_block(tiles.shape)

    in_statistics = in_tiles

    def in_rotary(self, rotary: RotaryNorm | None) -> list:
        if rotary is None:
            return []
        angles = [angle.reshape(-1, angle.shape[-1]) for angle in (rotary.cos, rotary.sin)]
        operands = [(angle, self._row_block(angle.shape[-1])) for angle in angles]
        if rotary.weight is None:
            return operands
        weight = rotary.weight.astype(jnp.float32)[None]
        return [*operands, (weight, pl.BlockSpec(weight.shape, lambda i: (0, 0)))]

    def out_rows(self, dtype):
        return jax.ShapeDtypeStruct((self.num_tiles * self.tile, self.width), dtype), self._row_block(self.width)

    def out_tiles(self, dtype):
        shape = self.kv_heads, self.num_tiles, self.group * self.tile, self.head_dim
        return jax.ShapeDtypeStruct(shape, dtype), self._tile_block(shape)

    def out_statistics(self, count: int):
        shape = self.kv_heads, self.num_tiles, count, self.group * self.tile
        return jax.ShapeDtypeStruct(shape, jnp.float32), self._tile_block(shape)

    def out_sums(self):
        block = pl.BlockSpec((1, 1, self.head_dim), lambda i: (i, 0, 0))
        return jax.ShapeDtypeStruct((self.steps, 1, self.head_dim), jnp.float32), block

    def _row_block(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.tiles_a_step * self.tile, width), lambda i: (i, 0))

    def _tile_block(self, shape) -> pl.BlockSpec:
        return pl.BlockSpec((self.kv_heads, self.tiles_a_step, *shape[2:]), lambda i: (0, i, 0, 0))

    def call(self, kernel, name: str, inputs, outputs, interpret):
        arrays, in_specs = zip(*inputs, strict=True)
        shapes, out_specs = zip(*outputs, strict=True)
        return pl.pallas_call(
            kernel, name=name, grid=(self.steps,), in_specs=list(in_specs), out_specs=list(out_specs),
            out_shape=list(shapes), interpret=interpret,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )(*arrays)  # fmt: skip
