"""What block-diffusion attention costs on a TPU, by the compiler's schedules: ours beside splash and dense attention.

One row of 2 x `length` positions (noisy half first), 16 query heads and 4 key heads of 128, block size 32, bfloat16, in
training: the forward pass saves what the backward pass needs (dense attention saves nothing and computes its scores
again: a matrix for every layer does not fit). Each program is compiled once for a length; the tiles are
then counted on 16 fixed rows of packed documents, and cycles are those of the 16 rows on one device's busiest
TensorCore. Tile lists are built once per training step and are not in the numbers.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.dense import dense_attention
from llada_jax.attention.tiles import tiles_for
from llada_jax.attention.visibility import Visibility, block_diffusion, layout
from llada_jax.bench import kernel, rows
from llada_jax.errors import InputError
from llada_jax.pod.aot import Program, compile_program
from llada_jax.pod.chips import Chip, parse_topology
from llada_jax.pod.hlo_cycles import xla_cycles
from llada_jax.pod.schedule_reader import Kernel, region_costs

IMPLEMENTATIONS = ("llada", "splash_static", "splash_tiles", "dense")
PASSES = ("forward", "backward", "both")
BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 32, 16, 4, 128
_MACS_PER_PAIR = {"forward": 2 * HEAD_DIM, "backward": 5 * HEAD_DIM}  # the backward pass computes the scores again


@dataclasses.dataclass(frozen=True)
class Class:
    """A kernel's region, "step" (the rest of a grid step) or "xla" (all that XLA schedules, once a row).

    tiles: how often the busiest core executes it. Its cycles are tiles x max(bundles, mxu_cycles).
    """

    bundles: float
    mxu_cycles: float
    tiles: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """A pass over the 16 rows. `tiles` counts all cores and heads; `peak_share` only pairs that the mask needs."""

    tiles: dict[str, int]
    classes: dict[str, Class]
    cycles: float
    peak_share: float
    dma_cycles: float  # the kernel's copies at HBM bandwidth, which run beside its arithmetic
    temp_bytes: int


def check_implementations(names) -> None:
    """Raises InputError on an unknown name, and on a baseline that is not installed."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise InputError(f"--implementations={name}, expected some of {', '.join(IMPLEMENTATIONS)}")
        if name.startswith("splash") and importlib.util.find_spec("tokamax") is None:
            raise InputError(f"--implementations={name}: tokamax is not installed; pip install 'llada_jax[bench]'")


def program(implementation: str, direction: str, length: int):
    """The function that is compiled for a pass, and its abstract arguments; called in the compiler's own process."""
    attend, arrays, mask = _program(implementation, length)

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


def costs(implementation: str, length: int, means, passes, topology: str) -> Iterator[tuple[int, str, Cost]]:
    """(mean document length, pass, Cost) of all, a pass at a time. Compiles a program for each, whatever the means."""
    chip = parse_topology(topology).chip
    for name in passes:
        compiled = _compile(implementation, name, length, topology)
        for mean in means:
            yield mean, name, _cost(implementation, name, length, mean, compiled, chip)


def needed_pairs(segments: np.ndarray, block_size: int) -> int:
    """Query-key pairs that the mask allows, summed over rows. segments [rows, length]."""
    mask = jax.tree.map(np.asarray, block_diffusion(layout(jnp.asarray(segments), block_size)))
    noisy = np.maximum(mask.noisy_end - mask.noisy_start, 0)
    clean = np.maximum(mask.clean_end - mask.clean_start, 0)
    return int(noisy.sum(dtype=np.int64) + clean.sum(dtype=np.int64))


def _compile(implementation: str, direction: str, length: int, topology: str) -> Program:
    arguments = {"implementation": implementation, "direction": direction, "length": length}
    schedules = implementation != "dense"
    return compile_program("llada_jax.bench.attention:program", arguments, topology, schedules)


def _program(implementation: str, length: int):
    """(attend(query, key, value, mask), abstract query, key and value, abstract mask) of one row."""
    if implementation == "dense":
        q, k = (jax.ShapeDtypeStruct((1, 2 * length, heads, HEAD_DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
        bound = jax.ShapeDtypeStruct((1, 2 * length), jnp.int32)
        return dense_attention, (q, k, k), Visibility(bound, bound, bound, bound, num_noisy=length)
    shape = length, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE
    if implementation == "llada":
        return kernel.program(*shape)
    return _splash().program(*shape, static=implementation == "splash_static")


def _splash():
    from llada_jax.bench import splash  # its tokamax is an extra

    return splash


def _walks(implementation: str, length: int, mean: int, chip: Chip) -> list[dict[str, rows.Walk]]:
    """{"forward", "backward": Walk} of each row."""
    if implementation == "llada":
        module = kernel
        tiles = tiles_for(chip.device_kind, HEAD_DIM, HEADS // KV_HEADS, 2 * length)
        make = jax.jit(lambda segments: kernel.plan(segments, BLOCK_SIZE, tiles))
    else:
        module, static = _splash(), implementation == "splash_static"
        make = jax.jit(lambda segments: module.tile_lists(length, BLOCK_SIZE, segments, static, module.TILE))
    plans = [make(segments) for segments in rows.segment_ids(length, mean)]
    shape = HEADS, KV_HEADS, HEAD_DIM
    return [{name: module.walk(plan, name, *shape) for name in ("forward", "backward")} for plan in plans]


def _cost(implementation: str, direction: str, length: int, mean: int, compiled: Program, chip: Chip) -> Cost:
    tiles, classes, dma_bytes = {"full": 0, "partial": 0}, {}, 0
    directions = ("forward", "backward") if direction == "both" else (direction,)
    if implementation != "dense":
        regions = (kernel if implementation == "llada" else _splash()).REGIONS
        walks = _walks(implementation, length, mean, chip)
        for name, schedule in zip(directions, compiled.kernels.values(), strict=True):
            executed, part = _classes(schedule, [walk[name] for walk in walks], regions[name], chip)
            prefix = f"{name} " if direction == "both" else ""
            classes |= {prefix + region: cost for region, cost in part.items()}
            tiles = {kind: tiles[kind] + executed[kind] for kind in tiles}
            dma_bytes += sum(walk[name].dma_bytes for walk in walks)
    classes["xla"] = Class(xla_cycles(compiled.hlo, chip).cycles, 0.0, rows.ROWS)
    cycles = sum(part.tiles * max(part.bundles, part.mxu_cycles) for part in classes.values())
    pairs = needed_pairs(rows.segment_ids(length, mean), BLOCK_SIZE)
    macs = pairs * HEADS * sum(_MACS_PER_PAIR[name] for name in directions)
    return Cost(
        tiles=tiles,
        classes=classes,
        cycles=cycles,
        peak_share=macs / (cycles * chip.macs_per_cycle * chip.cores_per_device),
        dma_cycles=dma_bytes / (chip.hbm_bandwidth / chip.devices) * chip.clock,
        temp_bytes=compiled.temp_bytes,
    )


def _classes(schedule: Kernel, walks: list[rows.Walk], names, chip: Chip):
    """(times that all cores execute each region, {region: Class} of the busiest core)."""
    # The split axis is of heads or of key/value heads, which two cores divide evenly.
    cores = chip.cores_per_device if schedule.split else 1
    executed = {name: sum(walk.regions[name] for walk in walks) for name in (*names, "step")}
    executed["launch"] = sum(max(walk.launches, cores) for walk in walks)
    found = region_costs(schedule, names).items()
    return executed, {name: Class(cost.bundles, cost.mxu_cycles, executed[name] // cores) for name, cost in found}
