"""The cost of one operation scheduled by XLA on a device, in seconds, and how the number was obtained.

The cost is the maximum of the cycles of its schedule, its FLOPs at the matrix units' peak, and its bytes at the share
of HBM's bandwidth that streams reach (chips.Chip.hbm_efficiency). Without a schedule a matrix product takes XLA's own
estimate. Bytes:

    each operand is read and each result is written once, with what fills their tiles; a core's fast memory is free
    of an operand that is sliced or gathered from, only the slices are read
    dynamic-update-slice and scatter write in place: the update is read and written; a scatter also reads its target
    what a fusion passes on or sends is neither read nor written: XLA fuses steps of collectives into matrix products
    a sort of n makes p(p + 1) / 2 passes over its operands, p = log2 n: compare-exchange at 1024 lanes per cycle and
    two instructions per operand

Pallas kernels and collectives are costed elsewhere. Compiler-estimated, not measured.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from llada_jax.chips import Chip
from llada_jax.pod.collectives import kind_of
from llada_jax.pod.hlo import Array, Module, Operation

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
NO_WORK = {
    "AllocateBuffer", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound", "Sharding",
    "PinToDeviceMemory", "MoveToHost", "MoveToDevice",
}  # fmt: skip
_VIEWS = {"bitcast", "get-tuple-element"}
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


def operation_cost(
    module: Module, computation: str, op: Operation, chip: Chip, cycles: Mapping[str, float] = {}
) -> OperationCost:
    """The cost of one run of an operation that calls no loop, branch, kernel or collective.

    cycles: of schedules, {operation: on the busiest core}.
    """
    if op.kind in FREE or op.kind.endswith(("-start", "-done", "-update")) or op.target in NO_WORK:
        return OperationCost()
    operations = ((computation, op), *module.inside(op))
    matmuls = [(name, inner) for name, inner in operations if is_matmul(inner)]
    flops = sum(matmul_flops(module, name, inner) for name, inner in matmuls)
    peak = chip.peak_bf16 / chip.devices * chip.schedule_efficiency
    passes = max((_passes(inner) for _, inner in matmuls), default=1)
    by_flops = flops * passes / peak
    by_schedule = cycles.get(op.name, 0.0) / chip.bundle_rate
    estimate = re.search(r'"estimated_cycles":"?(\d+)', op.attributes)
    if matmuls and not by_schedule and estimate and int(estimate.group(1)) < _SANE:
        by_schedule = int(estimate.group(1)) / chip.clock
    by_bytes = moved_bytes(module, computation, op) / chip.stream_bandwidth
    by_bytes = max(by_bytes, _sort_seconds(module, op, chip))
    computed = max(by_flops, by_schedule)
    return OperationCost(max(computed, by_bytes), flops, by_bytes if by_bytes > computed else 0.0)


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
    operands = [module.operand(computation, name).result for name in op.operands]
    if any(inner.kind == "scatter" for inner in (op, *(inner for _, inner in module.inside(op)))):
        updates = [x for arrays in operands for x in arrays if x.shape not in {result.shape for result in op.result}]
        return 3 * _hbm_bytes(updates)
    if op.kind != "fusion":
        read = sum(_read(module, (op,), name, x) for name, x in zip(op.operands, operands, strict=True))
        return read + _written(module, computation, op, op.result)
    inside = module.computations[op.called[0]]
    read = sum(_read(module, inside, _parameter(inside, i).name, arrays) for i, arrays in enumerate(operands))
    root = module.root(op.called[0])
    roots = [module.operand(op.called[0], name) for name in root.operands] if root.kind == "tuple" else [root]
    return read + sum(_written(module, op.called[0], each, (x,)) for each, x in zip(roots, op.result, strict=False))


def _parameter(computation: tuple[Operation, ...], number: int) -> Operation:
    return next(op for op in computation if op.kind == "parameter" and op.attributes.startswith(f"({number})"))


def _read(module: Module, inside: tuple[Operation, ...], name: str, arrays: tuple[Array, ...]) -> int:
    """Bytes read of an operand `name` of the operations `inside`, which is `arrays` in memory."""
    read = 0
    for user in inside:
        for number in (i for i, operand in enumerate(user.operands) if operand == name):
            if user.kind == "tuple" or kind_of(user):
                continue  # passed on; over links
            if user.kind in _VIEWS:
                read += _read(module, inside, user.name, arrays)
            elif user.kind == "fusion":
                nested = module.computations[user.called[0]]
                read += _read(module, nested, _parameter(nested, number).name, arrays)
            elif user.kind in ("slice", "dynamic-slice", "gather") and number == 0:
                read += sum(x.padded_bytes for x in user.result) if any(x.in_hbm for x in arrays) else 0
            elif not (user.kind == "dynamic-update-slice" and number == 0):
                return _hbm_bytes(arrays)
    return read


def _written(module: Module, computation: str, op: Operation, arrays: tuple[Array, ...]) -> int:
    """Bytes written of a result that `op` makes and that is `arrays` in memory."""
    while op.kind in _VIEWS and op.operands:
        op = module.operand(computation, op.operands[0])
    if op.kind == "parameter" or kind_of(op):
        return 0
    if op.kind == "fusion" and module.root(op.called[0]).kind != "tuple":
        return _written(module, op.called[0], module.root(op.called[0]), arrays)
    if op.kind == "dynamic-update-slice":
        update = module.operand(computation, op.operands[1]).result
        return sum(x.padded_bytes for x in update) if any(x.in_hbm for x in arrays) else 0
    return _hbm_bytes(arrays)


def _hbm_bytes(arrays: Iterable[Array]) -> int:
    return sum(array.padded_bytes for array in arrays if array.in_hbm)


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
