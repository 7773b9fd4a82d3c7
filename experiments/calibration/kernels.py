"""What the Pallas kernels of MaxText's step cost: splash attention and grouped matmuls, by the compiler's schedules.

schedules.py has the bundles of each region of a kernel's loop; the busiest core runs

    splash      a tile of queries and keys runs where the causal mask has a pair in it; begin and end, once per row of
                tiles. A grid narrower than the row is that of a sliding window.
    gmm, tgmm   a tile of rows runs once for each expert whose rows it has, for every tile of inputs and outputs; begin
                and end, once per tile of the result. Experts are equally likely.

Copies of blocks run beside the arithmetic: a kernel takes the longer of the two. Compiler-estimated, not measured.
"""

import math
import re

import numpy as np
from schedules import calls

from llada_jax.chips import Chip
from llada_jax.pod.experts_cost import group_sizes, tile_visits
from llada_jax.pod.hlo import Array, Module, Operation
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.step_cost import KernelCost


def costs(module: Module, recorded: dict[str, dict], chip: Chip, experts: int) -> dict[str, KernelCost]:
    """{call: cost}, longer names first, as the names are taken for prefixes. experts: of a layer, on a device."""
    by_call, listed = {}, {}
    found = [
        (op, [x for name in op.operands for x in module.operand(computation, name).result])
        for computation, op in sorted(calls(module), key=lambda call: -len(call[1].name))
    ]
    for op, operands in found:
        if "splash" in op.op_name and recorded[op.name]["bounds"][-1] is None:
            listed[_has_mask_tiles(operands)] = _listed_tiles(operands)
    for op, operands in found:
        kernel = recorded[op.name]
        if "splash" in op.op_name:
            part, cost = "attention", _splash(op, kernel, chip, listed.get(_has_mask_tiles(operands)))
        elif "gmm" in op.op_name or "ragged_dot" in op.op_name:
            part, cost = "experts", _grouped(op, operands, kernel, chip, experts)
        else:
            raise ValueError(f"{op.name}: an unknown kernel ({op.op_name})")
        by_call[op.name] = lambda result, operands, part=part, cost=cost: (part, cost)
    return by_call


def _has_mask_tiles(operands: list[Array]) -> bool:
    """Whether the mask is read for some tiles, as that of a sliding window is; a causal one is computed."""
    return any(x.dtype == "s8" and len(x.shape) == 3 for x in operands)


def _listed_tiles(operands: list[Array]) -> int:
    """Tiles of a head that the kernel's list names."""
    return max(x.elements for x in operands if x.dtype in ("s8", "s32") and len(x.shape) == 1)


def _splash(op: Operation, kernel: dict, chip: Chip, listed: int | None) -> OperationCost:
    """listed: visible tiles of a head, if a list of them is known for this mask; else the mask is causal."""
    suffix = next((s for s in ("_dkv", "_dq") if f"splash_mha{s}" in op.op_name or f"splash_mqa{s}" in op.op_name), "")
    by_keys = suffix == "_dkv"
    # Older kernels have the sizes in their names.
    options = kernel["options"] or {key: int(n) for key, n in re.findall(r"(block_[a-z_]+)_(\d+)", op.name)}
    queries, keys, computed = _splash_blocks(options, suffix)
    arrays = [array.shape for array in op.result]
    length = max(arrays[0][-2:])
    rows, (*outer, width) = length // (keys if by_keys else queries), kernel["bounds"]
    heads = math.prod(outer) / (1 if width is None else rows)  # of all sequences
    steps = listed if width is None else rows * width
    visits = listed or causal_tiles(length, queries, keys, by_keys, width)
    tile, rest = _tile_and_rest(kernel, keys // computed)
    cycles = heads * (visits * sum(tile) + rows * sum(rest) + steps * kernel["step"])
    # Of a tile the side that changes is copied, of a row of tiles the other side, in and out.
    sides = [_bytes(block) for block in kernel["blocks"][:3]]
    moved = heads * (visits * (sides[0] * 2 if by_keys else sides[1] + sides[2]) + rows * 2 * sum(sides))
    return _longer(cycles / _cores(kernel, chip) + kernel["launch"], moved, chip)


def _splash_blocks(options: dict, suffix: str) -> tuple[int, int, int]:
    """Queries and keys of a tile, and the keys that are computed at once. suffix: "", "_dq" or "_dkv"."""
    queries, keys = options[f"block_q{suffix}"], options[f"block_kv{suffix}"]
    return queries, keys, options.get(f"block_kv{suffix}_compute", keys)


def causal_tiles(length: int, queries: int, keys: int, by_keys: bool, width: int) -> int:
    """Tiles of queries x keys with a pair of the causal mask, at most the `width` last ones of a row of tiles.

    by_keys: rows of tiles are those of keys, and the `width` first ones count.
    """
    if by_keys:
        counts = length // queries - np.arange(0, length, keys) // queries
    else:
        counts = (np.arange(queries, length + 1, queries) - 1) // keys + 1
    return int(np.minimum(counts, width).sum())


def _grouped(op: Operation, operands: list[Array], kernel: dict, chip: Chip, experts: int) -> OperationCost:
    """Blocks of gmm: rows x inputs, weights, rows x outputs; of tgmm: rows x inputs, rows x outputs, gradients."""
    gradient = len(op.result[0].shape) == 3
    rows = max(array.shape[0] for array in operands if len(array.shape) == 2)
    sizes = group_sizes(rows, experts)
    visits = tile_visits(sizes, kernel["blocks"][0][0])
    outer = math.prod(n for n in kernel["bounds"] if n)
    tile, rest = _tile_and_rest(kernel, 1)
    # With several tiles of inputs, the one that ends a sum has a region of its own.
    inner = 1 if gradient else kernel["bounds"][-1]
    tiles = (max(tile) + (inner - 1) * min(tile)) / inner
    begun = outer * len(sizes) if gradient else outer // inner * visits
    cycles = outer * visits * (tiles + kernel["step"]) + begun * sum(rest)
    first = kernel["bounds"][0]  # its tiles are dealt to the cores
    cores = _cores(kernel, chip)
    cycles *= -(-first // cores) / first
    left, right, out = (_bytes(block) for block in kernel["blocks"])
    if gradient:
        moved = outer * (visits * (left + right) + len(sizes) * out)
    else:
        again = len(sizes) if inner == 1 else visits
        moved = outer * (visits * left + again * right) + outer // inner * visits * out
    matrix = max((array.shape for array in (*operands, *op.result) if len(array.shape) == 3), key=math.prod)
    return _longer(cycles + kernel["launch"], moved, chip, 2.0 * rows * matrix[-1] * matrix[-2])


def _tile_and_rest(kernel: dict, trips: float) -> tuple[list[float], list[float]]:
    """Cycles of the regions that multiply, and of those that begin or end a row of tiles. trips: of a loop in them."""
    regions = [(each["matmuls"], each["once"] + trips * each["looped"]) for each in kernel["regions"]]
    return [cycles for matmuls, cycles in regions if matmuls], [cycles for matmuls, cycles in regions if not matmuls]


def _cores(kernel: dict, chip: Chip) -> int:
    return chip.cores_per_device if kernel["split"] else 1


def _longer(cycles: float, moved: float, chip: Chip, flops: float = 0.0) -> OperationCost:
    return OperationCost(max(cycles / chip.bundle_rate, moved / chip.stream_bandwidth), flops)


def _bytes(block: list[int]) -> int:
    return 2 * math.prod(block)  # bfloat16
