"""The cost of a compiled step on one device: its scheduled operations in sequence, times the trip counts of loops.

Every operation belongs to a part: "attention" and "experts" (their Pallas kernels), "head" (in the head's scope),
"dense" (other matrix multiplications), "collectives", and "glue" (the rest). A program may name more scopes that are
parts. Arithmetic hides a collective that is fused with it or runs between its start and done; only the rest of the
collective counts. The same holds for copies to and from a core's fast memory and the host, which do not delay
collectives, and for everything that a SparseCore runs: its collectives cost as much as those of the TensorCores. A
conditional costs its most expensive branch. A loop is refused if neither the text nor the caller gives its trip count.
Compiler-estimated, not measured.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from llada_jax.chips import Chip
from llada_jax.pod.collectives import Collective, Devices, collective_cost, is_scattered, kind_of
from llada_jax.pod.hlo import HOST, Array, Module, Operation
from llada_jax.pod.operations import OperationCost, is_matmul, operation_cost

_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
PARTS = ("attention", "experts", "head", "dense", "glue", "collectives")


@dataclasses.dataclass
class Line:
    """An operation of the program. seconds, flops, from_bytes: over all runs; for a collective, the unhidden part.

    scope: its path of scopes in the program. hidden: seconds of a collective or copy behind arithmetic. bytes: sent by
    each device over the mesh axes `axes`.
    """

    name: str
    part: str
    scope: str
    runs: float
    seconds: float
    flops: float = 0.0
    from_bytes: float = 0.0
    hidden: float = 0.0
    bytes: float = 0.0
    axes: str = ""


def part_seconds(lines: Iterable[Line]) -> dict[str, float]:
    """{part: seconds}, of all PARTS."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for line in lines:
        seconds[line.part] += line.seconds
    return seconds


def scopes(op: Operation) -> list[str]:
    """The names in the operation's path of scopes."""
    return re.split(r"[/()]", op.op_name)


# (result, operands) of a Pallas kernel -> (the part it belongs to, the cost of one run).
KernelCost = Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[str, OperationCost]]


def step_lines(
    module: Module,
    chip: Chip,
    kernels: Mapping[str, KernelCost],
    devices: Devices | None = None,
    trips: Mapping[str, float] | None = None,
    untaken: Collection[str] = (),
    *,
    parts: Mapping[str, str] | None = None,
    cycles: Mapping[str, float] | None = None,
) -> list[Line]:
    """Every operation with a cost.

    kernels: costs of Pallas kernels, by the prefix of their names. devices: of the mesh; None for a program without
    collectives. trips: trip counts of loops that depend on the data, by their scope. untaken: scopes of conditional
    branches that are not taken. parts: {scope: the part of its operations}. There a fusion is where its matmul is; what
    XLA adds to a loop is where the loop is. cycles: of schedules, {operation: of one run} (aot.operation_cycles).
    Raises ValueError on a kernel without a cost, or a loop without a trip count.
    """
    walker = _Walker(_Program(module, chip, kernels, devices, trips or {}, untaken, parts or {}, cycles or {}))
    walker.walk(module.entry, 1.0)
    walker.hide()
    return [line for line in walker.lines if line.seconds or line.hidden or line.flops]


@dataclasses.dataclass(frozen=True)
class _Program:
    """The arguments of step_lines."""

    module: Module
    chip: Chip
    kernels: Mapping[str, KernelCost]
    devices: Devices | None
    trips: Mapping[str, float]
    untaken: Collection[str]
    parts: Mapping[str, str]
    cycles: Mapping[str, float]


@dataclasses.dataclass
class _Flight:
    """A collective or copy in progress: its line, what it goes over, and the seconds of arithmetic that hide it."""

    line: Line
    over: str  # "links", "host" or "hbm"; those over the same share the arithmetic
    behind: float = 0.0


class _Walker:
    def __init__(self, program: _Program, loop_part: str | None = None):
        self.program, self.module = program, program.module
        self.loop_part = loop_part  # of the scope of the loop that is walked
        self.lines: list[Line] = []
        self._flights: dict[tuple, _Flight] = {}  # all; collectives by channel and chain
        self._open: dict[str, list[_Flight]] = {}  # started, not done: by the name of the start
        self._prepared: dict[str, list[_Flight]] = {}  # of a SparseCore, not started

    def walk(self, computation: str, runs: float) -> None:
        for op in self.module.computations[computation]:
            if op.kind == "while":
                outside, self.loop_part = self.loop_part, self._scope_part(op)
                self.walk(op.called_as("body"), runs * self._trips(computation, op))
                self.loop_part = outside
            elif op.kind == "conditional":
                self._branches(op, runs)
            elif op.kind == "call":
                for name in op.called:
                    self.walk(name, runs)
            elif op.kind in ("call-start", "async-start"):
                self._open[op.name] = self._elsewhere(op, runs)
            elif op.kind == "custom-call-start":  # so writes libtpu 0.0.52
                self._prepared[op.name] = self._elsewhere(op, runs)
            elif op.kind == "custom-call-update":
                self._open[op.name] = self._prepared.pop(op.operands[0])
            elif op.target == "tpu_custom_call":
                self._kernel(computation, op, runs)
            else:
                self._operation(computation, op, runs)

    def _trips(self, computation: str, loop: Operation) -> float:
        trips = self.module.trip_count(computation, loop)
        if trips is None:
            trips = next((n for scope, n in self.program.trips.items() if scope in scopes(loop)), None)
        if trips is None:
            raise ValueError(f"{loop.name}: a loop of unknown length ({loop.op_name})")
        return trips

    def _branches(self, op: Operation, runs: float) -> None:
        branches = []
        for name in op.called:
            inside = {scope for inner in self.module.computations[name] for scope in scopes(inner)}
            if not inside.intersection(self.program.untaken):
                branches.append(self._lines(name, runs))
        self.lines += max(branches, key=lambda lines: sum(line.seconds for line in lines))

    def _elsewhere(self, op: Operation, runs: float) -> list[_Flight]:
        """Adds operations that run in parallel with the following ones."""
        lines = [line for name in op.called for line in self._lines(name, runs)]
        flights = [_Flight(line, "links" if line.part == "collectives" else "hbm") for line in lines]
        self.lines += (flight.line for flight in flights)
        self._flights |= {(op.name, len(self._flights), i): flight for i, flight in enumerate(flights)}
        return flights

    def _lines(self, computation: str, runs: float) -> list[Line]:
        walker = _Walker(self.program, self.loop_part)
        walker.walk(computation, runs)
        walker.hide()
        return walker.lines

    def _kernel(self, computation: str, op: Operation, runs: float) -> None:
        for name, cost_of in self.program.kernels.items():
            if op.name.startswith(name):
                operands = (self.module.operand(computation, operand).result for operand in op.operands)
                part, cost = cost_of(op.result, tuple(array for arrays in operands for array in arrays))
                return self._arithmetic(op, part, cost, runs)
        raise ValueError(f"{op.name}: a Pallas kernel of unknown cost ({op.op_name})")

    def _operation(self, computation: str, op: Operation, runs: float) -> None:
        if op.kind.endswith("-done"):
            self._open.pop(op.operands[0] if op.operands else "", None)
        copies = op.kind in _COPIES
        flights = [self._copy(op, runs)] if copies else self._collectives(computation, op, runs)
        if copies or kind_of(op):
            if op.kind.endswith("-start"):
                self._open[op.name] = flights[:1]
            return
        if op.name.startswith("async-collective-"):
            return  # of nothing but the collective
        cost = operation_cost(self.module, computation, op, self.program.chip, self.program.cycles)
        self._arithmetic(op, self._part(op), cost, runs, flights)

    def _arithmetic(self, op: Operation, part: str, cost: OperationCost, runs: float, fused=()) -> None:
        """Adds a line whose seconds hide what is in progress; collectives share them, and so do copies."""
        if not cost.seconds:
            return
        self._add(op, part, cost, runs)
        under_way = [*fused, *itertools.chain(*self._open.values())]
        for over in ("links", "host", "hbm"):
            flights = [flight for flight in under_way if flight.over == over]
            for flight in flights:
                flight.behind += cost.seconds * runs / len(flights)

    def _copy(self, op: Operation, runs: float) -> _Flight:
        """A copy between HBM and fast memory or the host, or within HBM; the smallest array of the tuple moves, the
        others are a stack of which it is a slice.
        """
        chip = self.program.chip
        arrays = [array for array in op.result if array.elements > 1]
        moved = min(array.padded_bytes for array in arrays)
        over = "host" if any(array.space == HOST for array in arrays) else "hbm"
        bandwidth = chip.host_bandwidth / chip.devices if over == "host" else chip.stream_bandwidth
        seconds = moved * (2 if all(array.in_hbm for array in arrays) else 1) / bandwidth * runs
        line = Line(op.name, self._scope_part(op) or "glue", op.op_name, runs, seconds, from_bytes=seconds)
        flight = _Flight(line, over)
        self.lines.append(flight.line)
        self._flights[(op.name, len(self._flights))] = flight
        return flight

    def _collectives(self, computation: str, op: Operation, runs: float) -> list[_Flight]:
        """The collectives that the operation is, or that are fused into it; each is counted once."""
        collectives = (
            [(computation, op)] if kind_of(op) else [pair for pair in self.module.inside(op) if kind_of(pair[1])]
        )
        flights = []
        for inside, inner in collectives:
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            chain_id = re.search(r'(?:chain_id|async_collective_name)="([^"]*)"', inner.attributes)
            fused = inner is not op and chain_id
            key = (channel and channel.group(1), chain_id.group(1)) if fused else (inside, inner.name)
            if key not in self._flights:
                cost = collective_cost(self.module, inside, inner, self.program.devices, is_scattered(op))
                self._flights[key] = _Flight(self._add_collective(inner, cost, runs), "links")
            flights.append(self._flights[key])
        return flights

    def _part(self, op: Operation) -> str:
        if "head" in scopes(op):
            return "head"
        matmuls = [inner for inner in (op, *(inner for _, inner in self.module.inside(op))) if is_matmul(inner)]
        if matmuls:
            return next(filter(None, map(self._scope_part, matmuls)), "dense")
        return self._scope_part(op) or "glue"

    def _scope_part(self, op: Operation) -> str | None:
        if not op.op_name:
            return self.loop_part
        return next((part for scope, part in self.program.parts.items() if scope in scopes(op)), None)

    def _add(self, op: Operation, part: str, cost: OperationCost, runs: float) -> None:
        cost = cost * runs
        self.lines.append(Line(op.name, part, op.op_name, runs, cost.seconds, cost.flops, cost.from_bytes))

    def _add_collective(self, op: Operation, cost: Collective, runs: float) -> Line:
        line = Line(
            f"{op.name} ({cost.kind})", "collectives", op.op_name, runs, cost.seconds * runs,
            bytes=cost.bytes * runs, axes=cost.axes,
        )  # fmt: skip
        self.lines.append(line)
        return line

    def hide(self) -> None:
        for flight in self._flights.values():
            line = flight.line
            line.hidden = min(line.seconds, flight.behind)
            line.seconds -= line.hidden
            line.from_bytes = min(line.from_bytes, line.seconds)
