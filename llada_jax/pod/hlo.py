"""Parses the text of a compiled program: computations, their operations in scheduled order, and loop trip counts.

    %while.7 = (s32[], bf16[4,8192]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.3), condition=%cond, body=%body, metadata={...}

S(n) is the memory space of an array: without it HBM, S(1) a core's fast memory, S(5) the host's.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations?)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)

HBM, FAST, HOST = 0, 1, 5


@dataclasses.dataclass(frozen=True)
class Array:
    """dtype as XLA writes it; shape; layout: {order of the sides, minor first:T(tile)S(space)}, or none."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @functools.cached_property
    def space(self) -> int:
        """HBM, FAST, HOST or another memory."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return int(space.group(1)) if space else HBM

    @property
    def in_hbm(self) -> bool:
        return self.space == HBM

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.elements * _bits(self.dtype) // 8)

    @functools.cached_property
    def padded_bytes(self) -> int:
        """Bytes that it takes in memory: with what fills the tiles of its layout."""
        tiled = re.match(r"\{([\d,]+):T\(([\d,]+)\)", self.layout)
        if not tiled:
            return self.bytes
        order, tile = (tuple(map(int, group.split(","))) for group in tiled.groups())
        tiles = dict(zip(order, reversed(tile), strict=False))  # the minor sides are tiled
        padded = math.prod(-(-side // tiles.get(axis, 1)) * tiles.get(axis, 1) for axis, side in enumerate(self.shape))
        return -(-padded * _bits(self.dtype) // 8)


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token"):
        return 8 * (dtype == "pred")
    return int(re.search(r"\d+", dtype).group())


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line. result: its arrays (several for a tuple); operands: names; attributes: the text after the operands."""

    name: str
    kind: str
    result_text: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def result(self) -> tuple[Array, ...]:
        return arrays(self.result_text)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, in order; for a conditional, its branches."""
        return tuple(name for group in _CALLED.findall(self.attributes) for name in _REFERENCE.findall(group))

    def called_as(self, role: str) -> str:
        return re.search(rf"\b{role}=%([\w.\-]+)", self.attributes).group(1)

    @property
    def op_name(self) -> str:
        """Where the program made it: jit(train_step)/jvp()/while/body/..."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def target(self) -> str:
        """custom_call_target, or "" without one."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: {name: operations in scheduled order}."""

    computations: dict[str, tuple[Operation, ...]]
    entry: str

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Operation]]:
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def operand(self, computation: str, name: str) -> Operation:
        return self._by_name[computation][name]

    def root(self, computation: str) -> Operation:
        return next(op for op in self.computations[computation] if op.root)

    def inside(self, op: Operation):
        """Yields (computation, operation) of all operations in the computations that `op` calls, recursively."""
        for name in op.called:
            for inner in self.computations.get(name, ()):
                yield name, inner
                yield from self.inside(inner)

    def trip_count(self, computation: str, loop: Operation) -> int | None:
        """The trip count of a loop that counts up by 1 to a constant; None for any other loop."""
        condition = loop.called_as("condition")
        test = self.root(condition)
        if test.kind != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (self.operand(condition, name) for name in test.operands)
        start = self._initial(computation, loop, counter)
        stop = bound if bound.kind == "constant" else self._initial(computation, loop, bound)
        if start is None or stop is None or stop.kind != "constant" or start.kind != "constant":
            return None
        return _integer(stop) - _integer(start)

    def _initial(self, computation: str, loop: Operation, element: Operation) -> Operation | None:
        """The initial value of an element of the loop's tuple, seen through copies."""
        if element.kind != "get-tuple-element":
            return None
        index = int(re.search(r"index=(\d+)", element.attributes).group(1))
        source = self.operand(computation, loop.operands[0])
        if source.kind != "tuple":
            return None
        source = self.operand(computation, source.operands[index])
        while source.kind in ("copy", "bitcast", "copy-done", "copy-start"):
            source = self.operand(computation, source.operands[0])
        return source


def arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(side) for side in sides.split(",") if side), layout)
        for dtype, sides, layout in _ARRAY.findall(text)
    )


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. Raises ValueError if it has no entry computation."""
    computations, entry, current = {}, None, None
    for line in _lines(text):
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (name := _NAME.match(line)):
            current.append(_operation(name, line[name.end() :]))
    if entry is None:
        raise ValueError("the HLO text has no entry computation")
    return Module({name: tuple(ops) for name, ops in computations.items()}, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines, with those joined over which a kernel's metadata are written."""
    whole = ""
    for line in text.splitlines():
        goes_on = whole and not _NAME.match(line) and not _HEADER.match(line) and line.strip() not in ("", "}")
        if not goes_on:
            yield whole
        whole = whole + line if goes_on else line
    yield whole


def _operation(name: re.Match, rest: str) -> Operation:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    operands = tuple(_REFERENCE.findall(rest[start:end]))
    # A constant's operand is its value, a parameter's its number.
    attributes = rest[start:] if rest[:start] in ("constant", "parameter") else rest[end + 1 :]
    return Operation(name.group(2), rest[:start], result, operands, attributes, bool(name.group(1)))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:120]}")


def _integer(constant: Operation) -> int:
    return int(re.match(r"\((-?\d+)\)", constant.attributes).group(1))
