"""The cost of the attention of a prompt's chunk: the schedule of training's kernel, times the tiles that are seen."""

import dataclasses

import jax
import jax.numpy as jnp

from llada_jax.attention.decoding import cached_kernel, prefix
from llada_jax.attention.kernel import operand_steps
from llada_jax.attention.plan import make_plan
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm
from llada_jax.attention.tiles import device_kind, tiles_for
from llada_jax.attention.visibility import block_window
from llada_jax.chips import Topology
from llada_jax.pod import attention_program
from llada_jax.pod.aot import compile_program
from llada_jax.pod.attention_cost import NAME, kernel_seconds
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.step_cost import KernelCost
from llada_jax.pod.stream_cost import compiled_costs
from llada_jax.pod.topology import one_device


@dataclasses.dataclass(frozen=True)
class Shape:
    """A chunk of one prompt on one device, and a cache of `length` positions. heads, kv_heads: of the device."""

    chunk: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int  # half of rotary_dim
    qk_norm: bool

    @property
    def keys(self) -> int:
        return self.chunk + cached_kernel.cache_sizes(self.length, self.head_dim)[0]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def program(shape: dict):
    """(attention of one layer, abstract arguments); called in the compiler's process."""
    shape = Shape(**shape)
    lanes = cached_kernel.cache_sizes(shape.length, shape.head_dim)[1]
    own = [(1, shape.chunk, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    cached = [(1, 1, shape.kv_heads, shape.keys - shape.chunk, lanes)] * 2

    def run(filled, rotary, *arrays):
        length = shape.keys - shape.chunk
        plan = prefix.make_plan(block_window(filled, 32, shape.chunk), length, shape.group, shape.head_dim)
        return prefix.prefix_attention(*arrays, jnp.int32(0), plan, rotary)

    norm = jax.ShapeDtypeStruct((shape.head_dim,), jnp.bfloat16) if shape.qk_norm else None
    angle = jax.ShapeDtypeStruct((1, shape.chunk, shape.rotated), jnp.float32)
    rotary = QueryKeyRotary(RotaryNorm(norm, angle, angle, eps=1e-6))
    arrays = (jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in (*own, *cached))
    return run, (jax.ShapeDtypeStruct((1,), jnp.int32), rotary, *arrays)


def kernel_costs(shape: Shape, filled: int, block: int, topology: Topology) -> dict[str, KernelCost]:
    """{prefix of a kernel's name: its cost in a layer}, with `filled` cached positions before the chunk."""
    compiled = compile_program(f"{__name__}:program", {"shape": dataclasses.asdict(shape)}, topology.name)
    with jax.set_mesh(one_device(topology)):
        tiles = tiles_for(device_kind(), shape.head_dim, shape.group, shape.chunk)
    counts = operand_steps(shape.chunk, shape.heads, shape.keys, shape.kv_heads, shape.head_dim, tiles)
    plan = make_plan(block_window(jnp.array([filled], jnp.int32), block, shape.chunk), shape.keys, tiles)
    executed = attention_program.kernel_counts(plan, "forward", shape.heads, shape.kv_heads, shape.head_dim)
    (schedule,) = (kernel for name, kernel in compiled.kernels.items() if NAME in name)
    seconds = kernel_seconds(schedule, executed, attention_program.REGIONS["forward"], topology.chip)
    flops = 4.0 * shape.heads * shape.head_dim * shape.chunk * (filled + (shape.chunk + block) / 2)
    costs = compiled_costs(compiled, counts, "attention", topology.chip)
    costs[NAME + "forward"] = lambda result, operands: ("attention", OperationCost(seconds, flops))
    costs[prefix.JOIN] = lambda result, operands: ("attention", _copied(shape, filled, tiles.chunk, topology))
    return costs


def _copied(shape: Shape, filled: int, chunk: int, topology: Topology) -> OperationCost:
    """One read and one write of own keys, and of the chunks of the cache that are filled."""
    positions = shape.chunk + -(-filled // chunk) * chunk
    seconds = 2 * 2 * positions * shape.kv_heads * shape.head_dim / topology.chip.stream_bandwidth
    return OperationCost(seconds, from_bytes=seconds)
