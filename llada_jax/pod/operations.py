"""The cost of one operation scheduled by XLA on a device, in seconds, and how the number was obtained.

The cost is the maximum of XLA's own estimate (`estimated_cycles`, if it is sane), the operation's FLOPs at the matrix
units' peak and, without an estimate of XLA, its bytes at HBM bandwidth. The bytes model, for gathers, scatters, sorts,
copies and the like:

    each operand is read and each result is written once; a core's fast memory is free
    a gather, or a slice, reads as much as it writes, independent of the size of the table
    dynamic-update-slice and scatter write in place: the update is read and written; a scatter also reads its target
    a sort of n makes p(p + 1) / 2 passes over its operands, p = log2 n: compare-exchange at 1024 lanes per cycle and
    two instructions per operand

Pallas kernels and collectives are costed elsewhere. Compiler-estimated, not measured.
"""

import dataclasses
import math
import re

from llada_jax.chips import Chip
from llada_jax.pod.hlo import Array, Module, Operation

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
NO_WORK = {
    "AllocateBuffer", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound", "Sharding",
    "PinToDeviceMemory", "MoveToHost", "MoveToDevice",
}  # fmt: skip
_SANE = 10**15  # garbage above this occurs on tpu7x
_LANES = 1024  # of one instruction of the vector unit


@dataclasses.dataclass(frozen=True)
class OperationCost:
    """seconds; flops: of matrix multiplications; from_bytes: the part of `seconds` from the bytes model."""

    seconds: float = 0.0
    flops: float = 0.0
    from_bytes: float = 0.0

    def __add__(self, other: "OperationCost") -> "OperationCost":
        return OperationCost(self.seconds + other.seconds, self.flops + other.flops, self.from_bytes + other.from_bytes)

    def __mul__(self, times: float) -> "OperationCost":
        return OperationCost(self.seconds * times, self.flops * times, self.from_bytes * times)


def operation_cost(module: Module, computation: str, op: Operation, chip: Chip) -> OperationCost:
    """The cost of one run of an operation that calls no loop, branch, kernel or collective."""
    if op.kind in FREE or op.kind.endswith(("-start", "-done", "-update")) or op.target in NO_WORK:
        return OperationCost()
    operations = ((computation, op), *module.inside(op))
    matmuls = [(name, inner) for name, inner in operations if is_matmul(inner)]
    flops = sum(matmul_flops(module, name, inner) for name, inner in matmuls)
    peak = chip.peak_bf16 / chip.devices
    passes = max((_passes(inner) for _, inner in matmuls), default=1)
    by_flops = flops * passes / peak
    estimate = re.search(r'"estimated_cycles":"?(\d+)', op.attributes)
    if estimate and int(estimate.group(1)) < _SANE:
        return OperationCost(max(int(estimate.group(1)) / chip.clock, by_flops), flops)
    by_bytes = max(
        moved_bytes(module, computation, op) / (chip.hbm_bandwidth / chip.devices), _sort_seconds(module, op, chip)
    )
    return OperationCost(max(by_flops, by_bytes), flops, by_bytes if by_bytes > by_flops else 0.0)


def _passes(matmul: Operation) -> int:
    """The number of bfloat16 passes in which the matrix units multiply, 1 or more for float32."""
    precision = re.search(r"operand_precision=\{(\w+)", matmul.attributes)
    return {"highest": 6, "high": 3}.get(precision.group(1) if precision else "", 1)


def is_matmul(op: Operation) -> bool:
    return op.kind in ("convolution", "dot")


def matmul_flops(module: Module, computation: str, op: Operation) -> float:
    """2 M N K, from the sizes M K, K N and M N of operands and result; for products without batch axes."""
    left, right = (module.operand(computation, name).result[0].elements for name in op.operands[:2])
    return 2 * math.sqrt(left * right * op.result[0].elements)


def moved_bytes(module: Module, computation: str, op: Operation) -> int:
    """Bytes to and from HBM by the model above."""
    operands = [array for name in op.operands for array in module.operand(computation, name).result]
    kinds = {op.kind, *(inner.kind for _, inner in module.inside(op))}
    if kinds & {"dynamic-update-slice", "scatter"}:
        updates = [array for array in operands if array.shape not in {result.shape for result in op.result}]
        return (3 if "scatter" in kinds else 2) * _hbm_bytes(updates)
    written = _hbm_bytes(op.result)
    if kinds & {"gather", "dynamic-slice", "slice"}:
        return 2 * sum(array.bytes for array in op.result)
    return written + _hbm_bytes(operands)


def _hbm_bytes(arrays: list[Array] | tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _sort_seconds(module: Module, op: Operation, chip: Chip) -> float:
    sorts = [inner for inner in (op, *(inner for _, inner in module.inside(op))) if inner.kind == "sort"]
    seconds = 0.0
    for sort in sorts:
        axis = int(re.search(r"dimensions=\{(\d+)\}", sort.attributes).group(1))
        log = math.ceil(math.log2(max(sort.result[0].shape[axis], 2)))
        elements = sum(array.elements for array in sort.result)
        instructions = elements / _LANES * 2 * log * (log + 1) / 2
        seconds += instructions / chip.cores_per_device / chip.clock
    return seconds
