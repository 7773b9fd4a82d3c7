"""The cost of what XLA itself schedules in a compiled program: the cycles it estimates, or bytes over bandwidth.

Pallas kernels are left out (schedule_reader costs them). Compiler-estimated, not measured.
"""

import dataclasses
import re

from llada_jax.pod.chips import Chip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-start", "copy-done",
    "partition-id", "replica-id",
}  # fmt: skip
_NO_WORK = ("tpu_custom_call", "AllocateBuffer", "PrepareAsyncCall")  # a Pallas kernel, or no work at all
_SANE = 10**15  # garbage above this occurs on tpu7x


@dataclasses.dataclass(frozen=True)
class XlaCost:
    """Cycles, and how many of them are this module's own estimate (bytes over bandwidth)."""

    cycles: float
    from_bytes: float


def xla_cycles(hlo: str, chip: Chip) -> XlaCost:
    """Sums a scheduled HLO text from its entry, a conditional at its dearest branch. Raises ValueError on a loop."""
    computations, entry, current = {}, None, None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("  ") and current is not None:
            current.append(line)
    cycles, from_bytes = _computation(computations, entry, chip)
    return XlaCost(cycles, from_bytes)


def _computation(computations, name: str, chip: Chip) -> tuple[float, float]:
    cycles = from_bytes = 0.0
    for line in computations[name]:
        more, more_from_bytes = _operation(computations, line, chip)
        cycles, from_bytes = cycles + more, from_bytes + more_from_bytes
    return cycles, from_bytes


def _operation(computations, line: str, chip: Chip) -> tuple[float, float]:
    match = _OPERATION.match(line)
    if match is None or match.group(2) in _FREE or any(name in line for name in _NO_WORK):
        return 0.0, 0.0
    result, kind = match.groups()
    if kind == "while":
        raise ValueError(f"a loop, whose trips the text does not say: {line.strip()[:120]}")
    if kind == "conditional":
        called = re.search(r"(?:branch_computations=\{|true_computation=)([^}\n]*)", line).group(1)
        branches = [_computation(computations, name, chip) for name in re.findall(r"%([\w.\-]+)", called)]
        return max(branches)
    if kind in ("call", "async-start", "call-start"):
        called = re.search(r"(?:to_apply|calls|called_computations?)=\{?%?([\w.\-]+)", line)
        return _computation(computations, called.group(1), chip) if called else (0.0, 0.0)
    estimate = re.search(r'"estimated_cycles":"?(\d+)', line)
    if estimate and int(estimate.group(1)) < _SANE:
        return float(estimate.group(1)), 0.0
    if kind.endswith(("-done", "-update")):
        return 0.0, 0.0
    # Written once and read once.
    by_bytes = 2 * _bytes(result) / (chip.hbm_bandwidth / chip.devices) * chip.clock
    return by_bytes, by_bytes


def _bytes(shape: str) -> int:
    total = 0
    for dtype, sides in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        elements = 1
        for side in filter(None, sides.split(",")):
            elements *= int(side)
        total += elements * bits // 8
    return total
