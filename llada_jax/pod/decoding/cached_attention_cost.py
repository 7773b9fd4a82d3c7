"""The cost of the attention kernel of decoding: its schedule, times the chunks of the cache that each row reads."""

import dataclasses

import jax
import jax.numpy as jnp

from llada_jax.attention.decoding import cached_kernel
from llada_jax.attention.visibility import two_block_window
from llada_jax.chips import Topology
from llada_jax.pod.aot import compile_program
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.schedule_reader import product_loop
from llada_jax.pod.step_cost import KernelCost


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pass on one device: queries of a row (two blocks), and a cache of `length` positions per row."""

    rows: int
    queries: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def lanes(self) -> int:
        """Of a cached position."""
        return cached_kernel.cache_sizes(self.length, self.head_dim)[1]


def program(shape: dict):
    """(attention of one layer, abstract arguments); called in the compiler's process."""
    shape = Shape(**shape)
    own, cached = (shape.rows, shape.queries), (1, shape.rows, shape.kv_heads, shape.length, shape.lanes)
    arrays = [(*own, shape.heads, shape.head_dim), *[(*own, shape.kv_heads, shape.head_dim)] * 2, cached, cached]

    def run(starts, query, key, value, cached_key, cached_value):
        visibility = two_block_window(starts, shape.queries // 2, jnp.zeros(starts.shape, bool))
        plan = cached_kernel.make_plan(visibility, shape.length, shape.heads // shape.kv_heads)
        return cached_kernel.cached_kernel_attention(query, key, value, cached_key, cached_value, 0, plan)

    starts = jax.ShapeDtypeStruct((shape.rows,), jnp.int32)
    return run, (starts, *(jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in arrays))


def kernel_costs(shape: Shape, filled: int, topology: Topology) -> dict[str, KernelCost]:
    """{prefix of the kernel's name: cost of a layer}, every row with `filled` cached positions to read."""
    target = f"{__name__}:program"
    ((name, kernel),) = compile_program(target, {"shape": dataclasses.asdict(shape)}, topology.name).kernels.items()
    chip, loop = topology.chip, product_loop(kernel)  # over the chunks of a unit but one
    either = [branch.total.cycles for branch in loop.inside if branch.total.mxu_cycles]  # by turns
    per_chunk = loop.own.cycles + sum(either) / len(either)
    chunk = min(cached_kernel.CHUNK, shape.length)
    chunks, units = max(-(-filled // chunk), 1), shape.rows * shape.kv_heads
    # Outside the loop: a unit's own keys, the scores of its first chunk, and what follows its last one.
    cycles = (chunks - 1) * per_chunk + kernel.program.total.bundles - loop.total.bundles
    cores = chip.cores_per_device if kernel.split else 1
    moved = units * chunks * chunk * shape.lanes * 2 * 2
    seconds = max(units / cores * cycles / chip.bundle_rate, moved / chip.stream_bandwidth)
    rows = shape.heads // shape.kv_heads * shape.queries
    flops = 4.0 * units * rows * (chunks * chunk + shape.queries) * shape.head_dim
    return {cached_kernel.NAME: lambda result, operands: ("attention", OperationCost(seconds, flops))}
