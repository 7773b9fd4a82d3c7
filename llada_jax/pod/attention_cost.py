"""The cost of the attention kernels of a training step: their schedules, times the tiles of a named packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.kernel import kernel_attention
from llada_jax.attention.plan import make_plan
from llada_jax.attention.tiles import device_kind, tiles_for
from llada_jax.attention.visibility import block_causal, block_diffusion, layout
from llada_jax.bench import kernel, rows
from llada_jax.bench.attention import kernel_classes, total_cycles
from llada_jax.bench.rows import Walk
from llada_jax.pod.aot import compile_program
from llada_jax.pod.chips import Chip, Topology
from llada_jax.pod.operations import Cost
from llada_jax.pod.schedule_reader import Kernel

PASSES = ("forward", "backward")
_MATMULS = {"forward": 2, "backward": 5}  # of a tile; the backward pass computes the scores again


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the attention of one row on one device: heads and kv_heads are those of the device, halves as in
    schedule.Phase.
    """

    length: int
    halves: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def positions(self) -> int:
        return self.length * (2 if self.halves == "both" else 1)

    def visibility(self, segment_ids: jax.Array, block_size: int):
        """segment_ids int32 [rows, length]."""
        where = layout(segment_ids, block_size if self.halves == "both" else self.length)
        return block_diffusion(where) if self.halves == "both" else block_causal(where)


def program(shape: dict):
    """(forward and backward of one row, abstract arguments); called in the compiler's own process."""
    shape = Shape(**shape)
    q, k = (jax.ShapeDtypeStruct((1, shape.positions, n, shape.head_dim), jnp.bfloat16)
            for n in (shape.heads, shape.kv_heads))  # fmt: skip
    tiles = tiles_for(device_kind(), shape.head_dim, shape.heads // shape.kv_heads, shape.positions)
    plan = jax.eval_shape(
        lambda segments: make_plan(shape.visibility(segments, 32), shape.positions, tiles),
        jax.ShapeDtypeStruct((1, shape.length), jnp.int32),
    )

    def both(query, key, value, plan, cotangent):
        out, vjp = jax.vjp(lambda q, k, v: kernel_attention(q, k, v, plan), query, key, value)
        return out, vjp(cotangent)

    return both, (q, k, k, plan, q)


def kernel_costs(shape: Shape, block_size: int, mean: int, num_rows: float, topology: Topology) -> dict[str, Cost]:
    """{"forward", "backward": Cost of one call for num_rows rows}: num_rows times the mean over the bench's rows of
    mean document length `mean`.
    """
    compiled = compile_program(
        "llada_jax.pod.attention_cost:program", {"shape": dataclasses.asdict(shape)}, topology.name
    )
    chip = topology.chip
    tiles = tiles_for(chip.device_kind, shape.head_dim, shape.heads // shape.kv_heads, shape.positions)
    make = jax.jit(lambda row: make_plan(shape.visibility(row[None], block_size), shape.positions, tiles))
    plans = [make(row) for row in rows.segment_ids(shape.length, mean)]
    costs = {}
    for name, schedule in zip(PASSES, compiled.kernels.values(), strict=True):
        walks = [kernel.walk(plan, name, shape.heads, shape.kv_heads, shape.head_dim) for plan in plans]
        seconds = np.mean([_seconds(schedule, walk, kernel.REGIONS[name], chip) for walk in walks])
        computed = np.mean([walk.regions["full"] + walk.regions["partial"] for walk in walks])
        pairs = tiles.queries * shape.heads // shape.kv_heads * getattr(tiles, name) * tiles.chunk
        flops = 2 * _MATMULS[name] * computed * pairs * shape.head_dim
        costs[name] = Cost(float(seconds) * num_rows, float(flops) * num_rows)
    return costs


def _seconds(schedule: Kernel, walk: Walk, names, chip: Chip) -> float:
    """Of one row: the busiest core's cycles, or the copies at HBM bandwidth where they take longer."""
    cycles = total_cycles(kernel_classes(schedule, [walk], names, chip)[1])
    return max(cycles / chip.clock, walk.dma_bytes / (chip.hbm_bandwidth / chip.devices))
