"""The cost of the kernels that project queries, keys, values and outputs in decoding: their schedules, tile by tile."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llada_jax.attention.decoding import projections
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm
from llada_jax.chips import Topology
from llada_jax.pod.aot import compile_program
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.schedule_reader import Region, product_loop
from llada_jax.pod.step_cost import KernelCost


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pass on one device: rows, positions of each (two blocks), sizes of the model; rotated: half of rotary_dim."""

    rows: int
    positions: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int

    @property
    def widths(self) -> list[int]:
        """Of queries, keys and values."""
        return [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]

    def tilings(self) -> tuple[projections.Tiling, projections.Tiling]:
        """Of the projections before attention and of that after it, on the current device."""
        sizes, dtype = (self.rows, self.positions), jnp.bfloat16
        return (
            projections.tiling(*sizes, self.embed, self.widths, self.head_dim, dtype),
            projections.tiling(*sizes, self.widths[0], [self.embed], projections.LANES, dtype),
        )


def program(shape: dict, output: bool):
    """(one layer's projections, abstract arguments); called in the compiler's process."""
    shape = Shape(**shape)
    positions, embed = (shape.rows, shape.positions), shape.embed

    def before(x, norm, weight, cos, sin, *stacks):
        rotary = QueryKeyRotary(*[RotaryNorm(weight, cos, sin, 1e-6)] * 2)
        return projections.project_heads(x, norm, stacks, jnp.int32(0), rotary, shape.head_dim)

    def after(x, stack):
        return projections.project(x, stack, jnp.int32(0))

    def arrays(*sizes, dtype=jnp.bfloat16):
        return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]

    if output:
        return after, arrays((*positions, shape.widths[0]), (1, shape.widths[0], embed))
    angles = arrays(*[(*positions, shape.rotated)] * 2, dtype=jnp.float32)
    vectors = arrays((*positions, embed), (embed,), (shape.head_dim,))
    return before, [*vectors, *angles, *arrays(*((1, embed, width) for width in shape.widths))]


def kernel_costs(shape: Shape, tilings: Sequence[projections.Tiling], topology: Topology) -> dict[str, KernelCost]:
    """{prefix of the kernels' name: cost of a call}. tilings: Shape.tilings."""
    before, after = tilings
    costs = (
        _cost(shape, False, before, shape.embed, shape.widths, topology),
        _cost(shape, True, after, shape.widths[0], [shape.embed], topology),
    )
    return {projections.NAME: lambda result, operands: ("dense", costs[len(result) == 1])}


def _cost(shape: Shape, output: bool, tiling, inputs: int, widths: Sequence[int], topology: Topology) -> OperationCost:
    arguments = {"shape": dataclasses.asdict(shape), "output": output}
    ((_, kernel),) = compile_program(f"{__name__}:program", arguments, topology.name).kernels.items()
    chip = topology.chip
    cores = chip.cores_per_device if kernel.split else 1

    positions = shape.rows * shape.positions
    blocks, tiles = positions // tiling.rows, math.ceil(sum(widths) / tiling.columns / cores)
    loop = product_loop(kernel)  # over the tiles of a block

    def outside(region: Region) -> float:
        if region is loop:
            return 0.0
        return (region.own.cycles + sum(map(outside, region.inside))) * (region.trips or 1)

    cycles = blocks * (outside(kernel.program) + tiles * loop.total.cycles)
    weights, tile = 2 * inputs * sum(widths), 2 * inputs * tiling.columns
    moved = blocks * weights + 2 * positions * (inputs + sum(widths))
    # Nothing runs beside the copy of the first tile of each core.
    seconds = max(cycles / chip.bundle_rate, moved / chip.stream_bandwidth) + cores * tile / chip.stream_bandwidth
    return OperationCost(seconds, 2.0 * positions * inputs * sum(widths))
