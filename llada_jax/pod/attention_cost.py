"""The cost of the attention kernels in a training step: their schedules times the tile counts of a packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention import context
from llada_jax.attention.kernel import kernel_attention, operand_steps
from llada_jax.attention.kernel_backward import key_parts
from llada_jax.attention.plan import Plan, make_plan
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm
from llada_jax.attention.tiles import Tiles, device_kind, tiles_for
from llada_jax.attention.visibility import block_causal, block_diffusion, make_layout
from llada_jax.chips import Chip, Topology
from llada_jax.pod import attention_program, packings
from llada_jax.pod.aot import Program, compile_program
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.packings import KernelCounts
from llada_jax.pod.schedule_reader import Kernel, region_costs
from llada_jax.pod.step_cost import KernelCost
from llada_jax.pod.stream_cost import compiled_costs
from llada_jax.pod.topology import one_device

PASSES = ("forward", "backward")
NAME = "block_diffusion_attention_"
_MATMULS = {"forward": 2, "backward": 5}  # of a tile; the backward pass computes the scores again


@dataclasses.dataclass(frozen=True)
class RegionCost:
    """The cost of a kernel's region, "step" (the rest of a grid step) or "xla" (all that XLA schedules, once per row).

    tiles: how often the busiest core executes it. Its cycles are tiles x max(bundles, mxu_cycles).
    """

    bundles: float
    mxu_cycles: float
    tiles: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention of one row on one device. heads, kv_heads: per device. halves: as in schedule.Phase. ranks: of the
    context axis, which divides the row's queries.
    """

    length: int
    halves: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: bool
    ranks: int = 1

    @property
    def num_noisy(self) -> int:
        return self.length if self.halves == "both" else 0

    @property
    def positions(self) -> int:
        return self.length + self.num_noisy

    def tiles(self) -> Tiles:
        """The tiles on the current device; key_parts too depends on it."""
        return tiles_for(device_kind(), self.head_dim, self.heads // self.kv_heads, self.positions // self.ranks)

    def key_parts(self) -> int:
        group = self.heads // self.kv_heads
        return key_parts(self.num_noisy, self.positions, self.tiles(), group, self.head_dim)

    def rank_queries(self) -> np.ndarray:
        """The queries of each rank, int [ranks, queries per rank]."""
        own = context.positions(self.length, self.ranks)
        return np.concatenate([own, self.length + own], axis=1) if self.num_noisy else own

    def plan(self, segment_ids: jax.Array, block_size: int, queries: jax.Array, tiles: Tiles, parts: int):
        """The plan of one row, segment_ids int32 [length], for some of its queries."""
        seen = jax.tree.map(lambda bound: bound[:, queries], self.visibility(segment_ids[None], block_size))
        return make_plan(seen, self.positions, tiles, parts)

    def visibility(self, segment_ids: jax.Array, block_size: int):
        """segment_ids int32 [rows, length]."""
        layout = make_layout(segment_ids, block_size if self.halves == "both" else self.length)
        return block_diffusion(layout) if self.halves == "both" else block_causal(layout)


def training_program(shape: dict):
    """(forward and backward pass of one row, abstract arguments); called in the compiler's process."""
    shape = Shape(**shape)
    sizes = (shape.positions // shape.ranks, shape.heads), (shape.positions, shape.kv_heads)
    q, k = (jax.ShapeDtypeStruct((1, *size, shape.head_dim), jnp.bfloat16) for size in sizes)
    tiles, parts = shape.tiles(), shape.key_parts()
    plan = jax.eval_shape(
        lambda segments: shape.plan(segments, 32, shape.rank_queries()[0], tiles, parts),
        jax.ShapeDtypeStruct((shape.length,), jnp.int32),
    )

    def both(query, key, value, rotary, plan, cotangent):
        def attend(query, key, value, rotary):
            return kernel_attention(query, key, value, plan, rotary=rotary)

        out, vjp = jax.vjp(attend, query, key, value, rotary)
        return out, vjp(cotangent)

    norm = jax.ShapeDtypeStruct((shape.head_dim,), jnp.bfloat16) if shape.qk_norm else None
    q_angle, k_angle = (jax.ShapeDtypeStruct((1, x.shape[1], shape.rotary_dim // 2), jnp.float32) for x in (q, k))
    rotary = QueryKeyRotary(*(RotaryNorm(norm, angle, angle, eps=1e-6) for angle in (q_angle, k_angle)))
    return both, (q, k, k, rotary if shape.ranks == 1 else rotary._replace(key=None), plan, q)


def kernel_costs(
    shape: Shape, block_size: int, mean: int, num_rows: float, topology: Topology
) -> dict[str, KernelCost]:
    """{prefix of a kernel's name: its cost for num_rows rows}."""
    compiled = compile_program(
        "llada_jax.pod.attention_cost:training_program", {"shape": dataclasses.asdict(shape)}, topology.name
    )
    with jax.set_mesh(one_device(topology)):
        tiles, parts = shape.tiles(), shape.key_parts()
    costs = {}
    for name, cost in _pass_costs(shape, block_size, mean, compiled, tiles, parts, topology.chip).items():
        costs[NAME + name] = lambda result, operands, cost=cost * num_rows: ("attention", cost)
    counts = operand_steps(
        shape.positions // shape.ranks, shape.heads, shape.positions, shape.kv_heads, shape.head_dim, tiles
    )
    return costs | compiled_costs(compiled, counts, "attention", topology.chip)


def _pass_costs(shape: Shape, block_size: int, mean: int, compiled: Program, tiles: Tiles, parts: int, chip: Chip):
    """{"forward", "backward": cost of one call for one row}, for the busiest rank, averaged over the bench's rows with
    mean document length `mean`. If the keys are split into parts, the backward pass has one call per part.
    """
    make = jax.jit(lambda row, queries: shape.plan(row, block_size, queries, tiles, parts))
    # [row][rank]
    plans = [
        [make(row, queries) for queries in shape.rank_queries()] for row in packings.segment_ids(shape.length, mean)
    ]
    costs = {}
    for name in PASSES:
        # One for each part of the keys, and all equal.
        schedule = next(schedule for kernel, schedule in compiled.kernels.items() if NAME + name in kernel)
        # [row, rank, call]
        counts = [[_counts(plan, name, shape) for plan in of_ranks] for of_ranks in plans]
        regions = attention_program.REGIONS[name]
        seconds = _per_call(counts, lambda each: kernel_seconds(schedule, each, regions, chip)).mean(axis=2)  # noqa: B023
        computed = _per_call(counts, lambda each: each.regions["full"] + each.regions["partial"]).mean()
        pairs = tiles.queries * shape.heads // shape.kv_heads * getattr(tiles, name) * tiles.chunk
        flops = 2 * _MATMULS[name] * computed * pairs * shape.head_dim
        costs[name] = OperationCost(float(seconds.max(axis=1).mean()), float(flops))
    return costs


def _counts(plan: Plan, name: str, shape: Shape) -> list[KernelCounts]:
    """The counts of each call of a kernel."""
    calls = plan.parts if name == "backward" and plan.parts else (plan,)
    return [attention_program.kernel_counts(call, name, shape.heads, shape.kv_heads, shape.head_dim) for call in calls]


def _per_call(counts: list[list[list[KernelCounts]]], value) -> np.ndarray:
    return np.array([[[value(each) for each in calls] for calls in of_ranks] for of_ranks in counts])


def kernel_seconds(schedule: Kernel, counts: KernelCounts, names, chip: Chip) -> float:
    """Seconds per row: the busiest core's cycles, or the copies at HBM bandwidth if they take longer."""
    cycles = total_cycles(kernel_regions(schedule, [counts], names, chip)[1])
    return max(cycles / chip.bundle_rate, counts.dma_bytes / chip.stream_bandwidth)


def kernel_regions(schedule: Kernel, counts: list[KernelCounts], names, chip: Chip):
    """Returns (executions of each region, over all cores; {region: RegionCost} of the busiest core)."""
    # The split axis is of heads or of key/value heads, which two cores divide evenly.
    cores = chip.cores_per_device if schedule.split else 1
    executed = {name: sum(each.regions[name] for each in counts) for name in (*names, "step")}
    executed["launch"] = sum(max(each.launches, cores) for each in counts)
    costs = region_costs(schedule, names).items()
    return executed, {name: RegionCost(cost.bundles, cost.mxu_cycles, executed[name] // cores) for name, cost in costs}


def total_cycles(regions: dict[str, RegionCost]) -> float:
    return sum(region.tiles * max(region.bundles, region.mxu_cycles) for region in regions.values())
