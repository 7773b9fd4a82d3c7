"""The cost of block-diffusion attention on a TPU, by the compiler's schedules: our kernel, splash and dense attention.

The program is training on one row of 2 x `length` positions (noisy half first), with 16 query heads and 4 key heads of
128, block size 32, bfloat16. The forward pass saves what the backward pass needs; dense attention saves nothing and
computes its scores again, since one matrix per layer would not fit. Each program is compiled once per length. Tiles
are counted on 16 fixed rows of packed documents; cycles are those of the 16 rows on one device's busiest TensorCore.
Tile lists are built once per training step and are not included.

The pass "decode" is another program, of our kernel only: 16 rows denoise one block each, against caches of `length`
that are filled to different shares (pod/packings.py).
"""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.dense import dense_attention
from llada_jax.attention.kernel import operand_steps
from llada_jax.attention.tiles import Tiles, tiles_for
from llada_jax.attention.visibility import Visibility, block_diffusion, make_layout
from llada_jax.bench.bars import bars
from llada_jax.chips import Chip, parse_topology
from llada_jax.errors import InputError
from llada_jax.model.useful_flops import allowed_pairs
from llada_jax.pod import attention_program, packings
from llada_jax.pod.aot import Program, compile_program
from llada_jax.pod.attention_cost import RegionCost, kernel_regions, total_cycles
from llada_jax.pod.hlo import parse
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.schedule_reader import Kernel
from llada_jax.pod.step_cost import step_lines
from llada_jax.pod.stream_cost import compiled_costs

IMPLEMENTATIONS = ("llada", "splash_static", "splash_tiles", "dense")
PASSES = ("forward", "backward", "both", "decode")
BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 32, 16, 4, 128
# The backward pass computes the scores again.
_MACS_PER_PAIR = {"forward": 2 * HEAD_DIM, "backward": 5 * HEAD_DIM, "decode": 2 * HEAD_DIM}


@dataclasses.dataclass(frozen=True)
class AttentionCost:
    """The cost of a pass over the 16 rows. tiles: over all cores and heads. peak_share: counts only pairs that the mask
    allows. tile_pairs: query-key pairs per tile, for each pass.
    """

    tiles: dict[str, int]
    tile_pairs: dict[str, int]
    classes: dict[str, RegionCost]
    cycles: float
    peak_share: float
    dma_cycles: float  # copies at HBM bandwidth, in parallel with the arithmetic
    temp_bytes: int


def check_implementations(names) -> None:
    """Raises InputError on an unknown name, or a baseline that is not installed."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise InputError(f"--implementations={name}, expected some of {', '.join(IMPLEMENTATIONS)}")
        if name.startswith("splash") and importlib.util.find_spec("tokamax") is None:
            raise InputError(f"--implementations={name}: tokamax is not installed; pip install 'llada_jax[bench]'")


def pass_program(implementation: str, direction: str, length: int, head_dim: int = HEAD_DIM, tiles: dict | None = None):
    """Returns (function to compile for a pass, its abstract arguments); called in the compiler's process.

    tiles: fields of the Tiles for our kernel, instead of the table's.
    """
    attend, arrays, mask = _program(implementation, length, head_dim, tiles, direction == "decode")
    if direction == "decode":
        return lambda arrays, mask: attend(*arrays, mask), (arrays, mask)

    def forward(arrays, mask):
        return jax.vjp(lambda q, k, v: attend(q, k, v, mask), *arrays)

    out, backward = jax.eval_shape(forward, arrays, mask)
    if implementation == "dense" and direction != "both":
        if direction == "forward":
            return lambda arrays, mask: forward(arrays, mask)[0], (arrays, mask)
        return lambda arrays, mask, cotangent: forward(arrays, mask)[1](cotangent), (arrays, mask, out)
    if direction == "forward":
        return forward, (arrays, mask)
    if direction == "backward":
        return lambda vjp, cotangent: vjp(cotangent), (backward, out)

    def both(arrays, mask, cotangent):
        out, vjp = forward(arrays, mask)
        return out, vjp(cotangent)

    return both, (arrays, mask, out)


def costs(implementation: str, length: int, means, passes, topology: str) -> Iterator[tuple[int, str, AttentionCost]]:
    """Yields (mean document length, pass, cost), one pass after the other; compiles one program per pass."""
    chip = parse_topology(topology).chip
    for name in passes:
        if name == "decode" and implementation != "llada":
            continue
        compiled = _compile(implementation, name, length, topology)
        for mean in (0,) if name == "decode" else means:
            yield mean, name, _cost(implementation, name, length, mean, compiled, chip)


def needed_pairs(segments: np.ndarray, block_size: int) -> int:
    """Query-key pairs that the mask allows, summed over rows. segments [rows, length]."""
    return allowed_pairs(block_diffusion(make_layout(jnp.asarray(segments), block_size)))


def _compile(implementation: str, direction: str, length: int, topology: str) -> Program:
    arguments = {"implementation": implementation, "direction": direction, "length": length}
    schedules = implementation != "dense"
    return compile_program("llada_jax.bench.attention:pass_program", arguments, topology, schedules)


def _program(implementation: str, length: int, head_dim: int, tiles: dict | None, decode: bool):
    """(attend(query, key, value, mask), abstract query, key and value, abstract mask) of one row."""
    if implementation == "dense":
        q, k = (jax.ShapeDtypeStruct((1, 2 * length, heads, head_dim), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
        bound = jax.ShapeDtypeStruct((1, 2 * length), jnp.int32)
        return dense_attention, (q, k, k), Visibility(bound, bound, bound, bound, num_noisy=length)
    shape = length, HEADS, KV_HEADS, head_dim, BLOCK_SIZE
    if implementation == "llada":
        return attention_program.kernel_program(*shape, Tiles(**tiles) if tiles else None, decode)
    return _splash().kernel_program(*shape, static=implementation == "splash_static")


def _splash():
    from llada_jax.bench import splash  # its tokamax is an extra

    return splash


def counts_per_row(direction: str, length: int, mean: int, head_dim: int, tiles: Tiles) -> list[packings.KernelCounts]:
    """The counts of our kernel per row; one entry for a decoding batch."""
    if direction == "decode":
        plans = [attention_program.decoding_plan(jnp.asarray(packings.cached(length)), length, BLOCK_SIZE, tiles)]
    else:
        plans = [attention_program.plan(segments, BLOCK_SIZE, tiles) for segments in packings.segment_ids(length, mean)]
    direction = "backward" if direction == "backward" else "forward"
    return [attention_program.kernel_counts(plan, direction, HEADS, KV_HEADS, head_dim) for plan in plans]


def _counts(implementation: str, direction: str, length: int, mean: int, chip: Chip) -> list[packings.KernelCounts]:
    if implementation == "llada":
        queries = BLOCK_SIZE if direction == "decode" else 2 * length
        tiles = tiles_for(chip.device_kind, HEAD_DIM, HEADS // KV_HEADS, queries)
        return counts_per_row(direction, length, mean, HEAD_DIM, tiles)
    splash, static = _splash(), implementation == "splash_static"
    make = jax.jit(lambda segments: splash.tile_lists(length, BLOCK_SIZE, segments, static, splash.TILE))
    plans = [make(segments) for segments in packings.segment_ids(length, mean)]
    return [splash.kernel_counts(plan, direction, HEADS, KV_HEADS, HEAD_DIM) for plan in plans]


def _cost(implementation: str, direction: str, length: int, mean: int, compiled: Program, chip: Chip) -> AttentionCost:
    tiles, tile_pairs, classes, dma_bytes = {"full": 0, "partial": 0}, {}, {}, 0
    directions = ("forward", "backward") if direction == "both" else (direction,)
    if implementation != "dense":
        regions = (attention_program if implementation == "llada" else _splash()).REGIONS
        for name, schedule in zip(directions, attention_kernels(compiled), strict=True):
            counts = _counts(implementation, name, length, mean, chip)
            executed, part = kernel_regions(schedule, counts, regions[name], chip)
            prefix = f"{name} " if direction == "both" else ""
            classes |= {prefix + region: cost for region, cost in part.items()}
            tiles = {kind: tiles[kind] + executed[kind] for kind in tiles}
            tile_pairs[name] = counts[0].tile_pairs
            dma_bytes += sum(each.dma_bytes for each in counts)
    # A decoding batch is one program.
    steps = _operand_steps(direction, length, chip) if implementation == "llada" else {}
    classes["xla"] = RegionCost(xla_cycles(compiled, chip, steps), 0.0, 1 if direction == "decode" else packings.ROWS)
    cycles = total_cycles(classes)
    if direction == "decode":
        pairs = int((packings.cached(length) + BLOCK_SIZE).sum()) * BLOCK_SIZE
    else:
        pairs = needed_pairs(packings.segment_ids(length, mean), BLOCK_SIZE)
    macs = pairs * HEADS * sum(_MACS_PER_PAIR[name] for name in directions)
    return AttentionCost(
        tiles=tiles,
        tile_pairs=tile_pairs,
        classes=classes,
        cycles=cycles,
        peak_share=macs / (cycles * chip.macs_per_cycle * chip.cores_per_device),
        dma_cycles=dma_bytes / chip.stream_bandwidth * chip.clock,
        temp_bytes=compiled.temp_bytes,
    )


def attention_kernels(compiled: Program) -> list[Kernel]:
    """The attention kernels of a program, without those that prepare operands."""
    return [kernel for name, kernel in compiled.kernels.items() if not re.search(r"attention_\w+_(tiles|rows)", name)]


def _operand_steps(direction: str, length: int, chip: Chip) -> dict[str, int]:
    batch, queries, keys = 1, 2 * length, 2 * length
    if direction == "decode":
        batch, queries, keys = packings.ROWS, BLOCK_SIZE, BLOCK_SIZE + length
    tiles = tiles_for(chip.device_kind, HEAD_DIM, HEADS // KV_HEADS, queries)
    return operand_steps(batch * queries, HEADS, batch * keys, KV_HEADS, HEAD_DIM, tiles)


def xla_cycles(compiled: Program, chip: Chip, steps: dict[str, int]) -> float:
    """Cycles outside the attention kernels: XLA's operations and our operand kernels. steps: {kernel name: steps}."""
    around = compiled_costs(compiled, steps, "attention", chip)
    costs = {op: cost for op in compiled.kernels for name, cost in around.items() if name in op}
    left_out = {"": lambda result, operands: ("attention", OperationCost())}
    return sum(line.seconds for line in step_lines(parse(compiled.hlo), chip, costs | left_out)) * chip.clock


def table(implementations, lengths, passes, topology_name: str) -> Iterator[dict]:
    """Prints a line per cost and yields its values, then prints the bars (bench/bars.py) that apply to them.

    Raises InputError on an unknown name.
    """
    check_implementations(implementations)
    topology = parse_topology(topology_name)
    for field, values, known in (("lengths", lengths, packings.LENGTHS), ("passes", passes, PASSES)):
        for value in values:
            if value not in known:
                raise InputError(f"--{field}={value}, expected some of {', '.join(map(str, known))}")
    chip = topology.chip
    print(f"{topology.name}: one device of {chip.cores_per_device} TensorCores at {chip.clock / 1e9:.2f} GHz")
    print("16 rows, compiler-estimated: Mcycles of the busiest core, share of matrix-unit peak, Mcycles of copies")
    print("length documents implementation  pass      full tiles  partial  Mcycles  peak  copies temp GiB")
    rows = []
    for length in lengths:
        for name in implementations:
            for mean, direction, cost in costs(name, length, packings.MEANS, passes, topology.name):
                print(
                    f"{length:6} {f'mean {mean}' if mean else 'one':9} {name:15} {direction:8} {cost.tiles['full']:11} "
                    f"{cost.tiles['partial']:8} {cost.cycles / 1e6:8.1f} {cost.peak_share:5.1%} "
                    f"{cost.dma_cycles / 1e6:7.1f} {cost.temp_bytes / 2**30:6.3f}",
                    flush=True,
                )
                case = {"implementation": name, "length": length, "mean_document": mean, "pass": direction}
                rows.append(case | dataclasses.asdict(cost) | {"topology": topology.name})
                yield rows[-1]
    for bar in bars(rows, HEAD_DIM):
        print(bar)
