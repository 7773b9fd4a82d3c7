"""The cost of the grouped matmuls of a training step: the Pallas kernels' schedules, times the tiles of a routing.

A tile of rows is visited once for every group that has rows in it, for every tile of columns. gmm multiplies at each
visit; tgmm clears its sum where a group begins, adds at each visit, and writes the sum where the group ends.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.model import grouped_tiles
from llada_jax.model.grouped_matmul import grouped_matmul
from llada_jax.pod.aot import compile_program
from llada_jax.pod.chips import Topology
from llada_jax.pod.operations import Cost
from llada_jax.pod.schedule_reader import Kernel, region_costs
from llada_jax.pod.topology import one_device

REGIONS = {"gmm": ("tile",), "tgmm": ("clear", "tile", "write")}


@dataclasses.dataclass(frozen=True)
class Shape:
    """[rows, contracted] times [groups, contracted, columns], on one device."""

    rows: int
    contracted: int
    columns: int
    groups: int


def program(shape: dict):
    """(the product, its gradient to the rows and to the matrices; abstract arguments), in the compiler's process."""
    s = Shape(**shape)
    x, dy = (jax.ShapeDtypeStruct((s.rows, side), jnp.bfloat16) for side in (s.contracted, s.columns))
    w = jax.ShapeDtypeStruct((s.groups, s.contracted, s.columns), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((s.groups,), jnp.int32)

    def both(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, "megablox"), x, w)
        return y, vjp(dy)

    return both, (x, w, sizes, dy)


def routing(rows: int, groups: int) -> np.ndarray:
    """Rows of each group, int [groups]: balanced, that is every row's group drawn alike, with a fixed seed."""
    return np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups))


def visits(sizes: np.ndarray, tile: int) -> int:
    """Pairs of a tile of rows and a group that has rows in it."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    return int(((ends + tile - 1) // tile - starts // tile)[sizes > 0].sum())


def kernel_costs(shape: Shape, sizes: np.ndarray, topology: Topology) -> dict[tuple[str, int, int], Cost]:
    """Of one call of each kernel of the product, its gradients included, by (kernel, contracted, columns)."""
    target, arguments = "llada_jax.pod.expert_cost:program", {"shape": dataclasses.asdict(shape)}
    compiled = compile_program(target, arguments, topology.name)
    found = {}
    for name, schedule in compiled.kernels.items():
        kind = "tgmm" if "tgmm" in name else "gmm"
        # As the program calls them: y, then dx, then dw.
        forward = (shape.contracted, shape.columns)
        key = (kind, *(forward if kind == "tgmm" or name.startswith("jvp") else forward[::-1]))
        found[key] = _cost(key, schedule, shape, sizes, topology)
    return found


def _cost(key, schedule: Kernel, shape: Shape, sizes: np.ndarray, topology: Topology) -> Cost:
    kind, contracted, columns = key
    chip = topology.chip
    with jax.set_mesh(one_device(topology)):
        choose = grouped_tiles.group_gradients if kind == "tgmm" else grouped_tiles.rows_times_groups
        tile, part, width = choose(shape.rows, contracted, columns, False)
    across = -(-contracted // part) * -(-columns // width)
    visited = visits(sizes, tile) * across
    regions = region_costs(schedule, REGIONS[kind])
    executed = {"tile": visited, "step": visited, "launch": 1}
    if kind == "tgmm":
        executed |= dict.fromkeys(("clear", "write"), len(sizes) * across)
        moved = visited * tile * (part + width) + shape.groups * contracted * columns
    else:
        moved = visited * tile * part + shape.groups * contracted * columns + shape.rows * columns
    cores = chip.cores_per_device if schedule.split else 1
    cycles = sum(cost.cycles * executed[name] / (1 if name == "launch" else cores) for name, cost in regions.items())
    seconds = max(cycles / chip.clock, 2 * moved / (chip.hbm_bandwidth / chip.devices))
    return Cost(seconds, 2.0 * float(sizes.sum()) * contracted * columns)
