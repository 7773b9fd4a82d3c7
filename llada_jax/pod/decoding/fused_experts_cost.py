"""The cost of the experts' kernel of decoding: its schedule under uniform routing, or the weights that it streams."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.chips import Topology
from llada_jax.model import fused_experts
from llada_jax.model.declarations import SCALE
from llada_jax.pod.aot import compile_program
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.schedule_reader import Kernel
from llada_jax.pod.step_cost import KernelCost


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call, or several, on one device. experts: on it; all_experts: of which each token takes k. stored: dtype of the
    weights.
    """

    tokens: int
    embed: int
    width: int
    experts: int
    all_experts: int
    k: int
    stored: str = "bfloat16"

    def calls(self) -> tuple[int, fused_experts.Cut] | None:
        """As fused_experts.fused_calls, on the current device."""
        sizes = self.tokens, self.embed, self.width
        pairs = self.tokens * self.k
        return fused_experts.fused_calls(*sizes, pairs, self.all_experts, jnp.bfloat16, stored=jnp.dtype(self.stored))


def program(shape: dict, pieces: int, ahead: int):
    """(a layer, abstract arguments); called in the compiler's process."""
    shape = Shape(**shape)
    into, out = ((1, shape.experts, *sizes) for sizes in ((shape.embed, shape.width), (shape.width, shape.embed)))
    arrays = [(shape.tokens, shape.embed), (shape.embed, shape.all_experts)]
    stacks = {
        name: jax.ShapeDtypeStruct(sizes, shape.stored) for name, sizes in dict(gate=into, up=into, down=out).items()
    }
    if shape.stored == "int8":
        stacks |= {
            name + SCALE: jax.ShapeDtypeStruct((1, shape.experts, 1, stack.shape[-1]), jnp.float32)
            for name, stack in stacks.items()
        }

    def run(experts, expert_weights, x, router, stacks):
        cut = fused_experts.Cut(pieces=pieces, ahead=ahead)
        weights = stacks | dict(layer=jnp.int32(0), router=router)
        return fused_experts.fused_experts(x, experts, expert_weights, weights, cut)

    routed = (jax.ShapeDtypeStruct((shape.k, shape.tokens), dtype) for dtype in (jnp.int32, jnp.float32))
    return run, (*routed, *(jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in arrays), stacks)


def kernel_costs(shape: Shape, cut: fused_experts.Cut, topology: Topology) -> dict[str, KernelCost]:
    """{prefix of the kernel's name: cost of a call}; every expert is equally likely."""
    shape = dataclasses.replace(shape, tokens=shape.tokens // cut.parts)
    target, arguments = (
        f"{__name__}:program",
        {"shape": dataclasses.asdict(shape), "pieces": cut.pieces, "ahead": cut.ahead},
    )
    ((_, kernel),) = compile_program(target, arguments, topology.name).kernels.items()
    chip, tile = topology.chip, fused_experts.tile_rows(shape.tokens * shape.k / shape.all_experts)
    rows, chance = _rows(shape)
    reached = shape.experts * (1 - chance[0])
    cores = chip.cores_per_device if kernel.split else 1
    per_piece, per_tile, per_group, rest = _cycles(kernel, shape)
    tiles, groups = (shape.experts * float(chance @ np.ceil(rows / size)) for size in (tile, fused_experts.GROUP))
    cycles = rest + cut.pieces * (reached * per_piece + tiles * per_tile + groups * per_group) / cores
    itemsize = jnp.dtype(shape.stored).itemsize
    moved = reached * 3 * shape.embed * shape.width * itemsize + (cores + 1) * shape.tokens * shape.embed * 2
    seconds = max(cycles / chip.bundle_rate, moved / chip.stream_bandwidth)
    cost = OperationCost(seconds, 2.0 * tiles * tile * 3 * shape.embed * shape.width) * cut.parts
    return {fused_experts.NAME: lambda result, operands: ("experts", cost)}


def _rows(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of rows of an expert, chance of each): each token takes it with probability k / all_experts."""
    n, p = shape.tokens, shape.k / shape.all_experts
    rows = np.arange(n + 1)
    log = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in rows]
    return rows, np.exp(np.array(log) + rows * math.log(p) + (n - rows) * math.log1p(-p))


def _cycles(kernel: Kernel, shape: Shape) -> tuple[float, float, float, float]:
    """Of a piece of an expert, a tile, a group of rows (in and out) and all else.

    The loop over groups is inside that over tiles, which is inside that over pieces; beside it are three loops over
    all tokens, a group at a time: clearing, bringing in, sending out.
    """
    loops = [region for region in kernel.program.walk() if region.loop]
    tiles = next(loop for loop in loops if loop.own.mxu_cycles)
    pieces = next(loop for loop in loops if loop is not tiles and tiles in loop.walk())
    groups = [loop for loop in tiles.walk() if loop.loop and loop is not tiles]
    others = [loop for loop in loops if loop not in pieces.walk()]
    innermost = [loop for loop in others if not any(inner.loop for inner in loop.inside)]
    per_group = sum(loop.own.cycles for loop in groups)
    per_piece = pieces.total.bundles - tiles.total.bundles
    rest = sum(loop.own.cycles for loop in innermost) * shape.tokens / fused_experts.GROUP
    return per_piece, tiles.own.cycles, per_group, rest
