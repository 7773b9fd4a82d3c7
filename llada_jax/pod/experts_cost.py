"""The cost of the grouped matmuls of a layer's experts on a TPU, by the compiler's schedules: megablox and tokamax.

The work is one device's share of a step: TOKENS positions, num_experts_per_token experts each, bfloat16, all experts on
this device. Both kernels use the tiles of model/grouped_tiles.py. Tiles are counted for one fixed draw of the rows per
expert, with equally likely experts. Cycles are those of the device's busiest TensorCore; sorting, gathering and the
lists of tiles are not included.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.tiles import device_kind
from llada_jax.chips import Chip, Topology, parse_topology
from llada_jax.model import activation, grouped_matmul, grouped_tiles
from llada_jax.model.config import ModelConfig
from llada_jax.pod.aot import compile_program
from llada_jax.pod.schedule_reader import region_costs
from llada_jax.pod.step_cost import KernelCost
from llada_jax.pod.stream_cost import stream_costs

IMPLEMENTATIONS = ("megablox", "tokamax")
PASSES = ("forward", "dx", "dw")
TOKENS = 4 * 8192  # four rows of 2 x 4096 positions
# The kernels' regions with vector work, in program order; tokamax's tile is a whole step, without a branch.
_DW = ("zero", "tile", "write")
REGIONS = {
    "megablox": {"forward": ("tile",), "dx": ("tile",), "dw": _DW},
    "tokamax": {"forward": (), "dx": (), "dw": _DW},
}


@dataclasses.dataclass(frozen=True)
class MatmulCost:
    """The cost of a grouped matmul. tile: (rows, contracted, columns). steps: of the grid. peak_share: of the matrix
    units of all cores, for useful rows only. dma_cycles: copies at HBM bandwidth, in parallel with the arithmetic.
    """

    tile: tuple[int, int, int]
    steps: int
    cycles: float
    peak_share: float
    dma_cycles: float


def matmuls(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{name: (inputs, outputs)} of a layer's grouped matmuls; gate and up are one matmul."""
    return {
        "gate_up": (config.hidden_size, 2 * config.moe_intermediate_size),
        "down": (config.moe_intermediate_size, config.hidden_size),
    }


def group_sizes(rows: int, groups: int) -> np.ndarray:
    """Rows per expert, int [groups]: a fixed draw with equally likely experts."""
    return np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups))


def matmul_program(implementation: str, direction: str, rows: int, groups: int, contracted: int, columns: int):
    """Returns (function to compile for y = x w, dx or dw; its abstract arguments)."""
    x, w, y, sizes = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, contracted), jnp.bfloat16), ((groups, contracted, columns), jnp.bfloat16),
            ((rows, columns), jnp.bfloat16), ((groups,), jnp.int32),
        )
    )  # fmt: skip
    gmm, tgmm = (_megablox if implementation == "megablox" else _tokamax)()
    if direction == "forward":
        return lambda x, w, sizes: gmm(x, w, sizes, False), (x, w, sizes)
    if direction == "dx":
        return lambda y, w, sizes: gmm(y, w, sizes, True), (y, w, sizes)
    return tgmm, (x, y, sizes)


def _megablox():
    def gmm(x, w, sizes, transposed):
        return grouped_matmul.rows_times_groups(x, w, sizes, transpose_rhs=transposed)

    return gmm, grouped_matmul.group_gradients


def _tokamax():
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernel  # an extra

    common = dict(precision=(jax.lax.Precision.DEFAULT,) * 2, out_dtype=jnp.bfloat16)

    def gmm(x, w, sizes, transposed):
        tile = grouped_tiles.rows_times_groups(*x.shape, w.shape[1 if transposed else 2], device_kind())
        return kernel.gmm(x, w, sizes, tiling=tile, transpose_rhs=transposed, **common)

    def tgmm(x, y, sizes):
        tile = grouped_tiles.group_gradients(*x.shape, y.shape[1], device_kind())
        return kernel.tgmm(x.swapaxes(0, 1), y, sizes, tiling=tile, **common)

    return gmm, tgmm


def activation_program(rows: int, mlp: int):
    """Returns (a function that runs both activation kernels; its abstract arguments)."""
    gate_up, d_hidden = (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16) for width in (2 * mlp, mlp))
    weights = jax.ShapeDtypeStruct((rows,), jnp.float32)

    def both(gate_up, weights, d_hidden):
        hidden = activation.weighted_swiglu(gate_up, weights, "megablox")
        return hidden, *activation.weighted_swiglu_gradients(gate_up, weights, d_hidden, "megablox")

    return both, (gate_up, weights, d_hidden)


def activation_costs(mlp: int, topology: Topology) -> dict[str, KernelCost]:
    """{kernel name: cost} of the activation kernels for experts of width `mlp`. Compiles them."""
    rows = 8 * TOKENS  # more than fits fast memory
    steps = -(-rows // activation.tile(rows, 2 * mlp, jnp.dtype("bfloat16")))
    arguments = {"rows": rows, "mlp": mlp}
    return stream_costs("llada_jax.pod.experts_cost:activation_program", arguments, steps, "experts", topology)


def kernel_cost(
    implementation: str, direction: str, sizes: np.ndarray, contracted: int, columns: int, topology: str, rows: int = 0
) -> MatmulCost:
    """The cost of a pass of y [rows, columns] = x [rows, contracted] times the group's matrix, on one device.

    Compiles it. sizes: rows per group. rows: those of the buffer, if it is larger than their sum.
    """
    arguments = dict(rows=rows or int(sizes.sum()), groups=len(sizes), contracted=contracted, columns=columns)
    arguments |= {"implementation": implementation, "direction": direction}
    (kernel,) = compile_program("llada_jax.pod.experts_cost:matmul_program", arguments, topology).kernels.values()
    regions = region_costs(kernel, REGIONS[implementation][direction])
    shape = (columns, contracted) if direction == "dx" else (contracted, columns)
    return _cost(regions, kernel.split, direction, sizes, shape, parse_topology(topology).chip)


def _cost(
    regions: dict, split: bool, direction: str, sizes: np.ndarray, shape: tuple[int, int], chip: Chip
) -> MatmulCost:
    contracted, columns = shape
    choose = grouped_tiles.group_gradients if direction == "dw" else grouped_tiles.rows_times_groups
    tile = choose(int(sizes.sum()), contracted, columns, kind=chip.device_kind)
    parts = -(-contracted // tile[1]) * -(-columns // tile[2])
    visits = tile_visits(sizes, tile[0])
    times = {"tile": visits * parts, "step": visits * parts, "launch": 1}
    times |= {"zero": len(sizes) * parts, "write": len(sizes) * parts}
    # The split axis is that of the columns; its tiles are dealt to the cores in turn.
    cores = chip.cores_per_device if split else 1
    tiles_of_columns = -(-columns // tile[2])
    share = -(-tiles_of_columns // cores) / tiles_of_columns
    cycles = sum(cost.cycles * times[region] * (1 if region == "launch" else share) for region, cost in regions.items())
    macs = int(sizes.sum()) * contracted * columns
    return MatmulCost(
        tile=tile,
        steps=times["step"],
        cycles=cycles,
        peak_share=macs / (cycles * chip.macs_per_cycle * chip.cores_per_device),
        dma_cycles=_moved(direction, sizes, tile, shape) / chip.stream_bandwidth * chip.clock,
    )


def tile_visits(sizes: np.ndarray, tile: int) -> int:
    """The number of tiles of `tile` rows that each group touches, summed; a tile on a border counts for both groups."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    return int(np.where(sizes > 0, -(-ends // tile) - starts // tile, 0).sum())


def _moved(direction: str, sizes: np.ndarray, tile, shape) -> int:
    """Bytes that a kernel copies; a block is fetched if its index changes from one step to the next."""
    rows, groups = int(sizes.sum()), int((sizes > 0).sum())
    (contracted, columns), (_, part, width) = shape, tile
    parts, widths = -(-contracted // part), -(-columns // width)
    if direction == "dw":
        return 2 * (rows * contracted * widths + rows * columns * parts + len(sizes) * contracted * columns)
    again = groups if parts == 1 else tile_visits(sizes, tile[0])  # all of a group's matrix stays for its tiles
    return 2 * (rows * contracted * widths + again * contracted * columns + rows * columns)
