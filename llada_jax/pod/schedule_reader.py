"""The cost of a Pallas kernel, read from the TPU compiler's schedule.

For each kernel the compiler writes its VLIW bundles (one is issued per cycle) and the units that each bundle uses.
Branches delimit the regions: the loop over the grid and, in it, one region per `pl.when`, in program order.

    0x2a4   : > { ... = sbr.rel (%p4) target = $region80 }     skips ...
     ...                                                       ... this region
    0x74e PF: > { ... } /* Start/End empty region 80 */        ... to here

libtpu 0.0.23 writes "target bundleno = 2042 (0x7fa), region = 80", and the number is not the address.

A kernel's time is that of its busiest TensorCore: the sum over regions of max(bundles, matrix-unit occupancy) times the
executions on that core. Stalls and copies are not included, so it is a lower bound. Compiler-estimated, not measured.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from llada_jax.chips import Chip

# Rows that one instruction streams through a matrix unit: 8 sublanes of 32 bits each; the "lmr" form, from transposed
# registers, half of that.
_ROWS = {"bf16": 16, "lmr.bf16": 8, "f32": 8}
_SMALL = 0.05  # of a program's bundles
_FEWEST_STORES = 64  # of a region that computes
_ADDRESS = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})? *:(?: |>)*\{")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\([^)]*\) )?target (?:= \$region|bundleno = [^,]*, region = )(\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_MATMUL = re.compile(r"\bvmatmul\.(?:mubr\.)?(?:msk\.)?((?:lmr\.)?\w+)")


@dataclasses.dataclass(frozen=True)
class ScheduleCost:
    """Bundles, cycles that occupy the matrix units, and uses of each unit's slots ("VALU", "VLOAD", ...)."""

    bundles: int = 0
    mxu_cycles: float = 0.0
    slots: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def cycles(self) -> float:
        return max(self.bundles, self.mxu_cycles)

    def __add__(self, other: "ScheduleCost") -> "ScheduleCost":
        slots = {unit: self.slots.get(unit, 0) + other.slots.get(unit, 0) for unit in self.slots | other.slots}
        return ScheduleCost(self.bundles + other.bundles, self.mxu_cycles + other.mxu_cycles, slots)


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles [start, end) that a branch skips, or a loop repeats.

    own: the cost without the regions inside. trips: of a loop that counts to a constant.
    """

    start: int
    end: int
    loop: bool
    own: ScheduleCost
    inside: tuple["Region", ...]
    trips: int | None = None

    @property
    def total(self) -> ScheduleCost:
        return sum((region.total for region in self.inside), self.own)

    def walk(self) -> Iterator["Region"]:
        yield self
        for region in self.inside:
            yield from region.walk()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's bundles as a tree of regions, and whether its grid is split between the TensorCores of a device.

    Only an axis of at least 2 that is declared `parallel` is split, and only on a chip whose device has two cores.
    """

    program: Region
    split: bool


class UnknownRegions(ValueError):
    """A kernel's regions are not those that its caller names."""


def read_schedule(bundles_text: str, utilization_text: str, chip: Chip) -> Kernel:
    """Parses a kernel's *-final_bundles.txt and *-final_hlo-static-per-bundle-utilization.txt.

    Raises ValueError if the two do not match.
    """
    bundles = _split_bundles(bundles_text)
    costs = _bundle_costs(bundles, utilization_text, chip)
    starts = {label: i for i, text in reversed(list(enumerate(bundles))) for label in _START.findall(text)}
    spans = {(0, len(bundles), False)}
    for i, text in enumerate(bundles):
        for label in _BRANCH.findall(text):
            if label not in starts:
                continue  # the label of the kernel's end
            target = starts[label]
            spans.add((i, target, False) if target > i else (target, i + 1, True))
    # Outer spans first; equal spans cannot occur, as a branch starts one and a label the other.
    exits = {i: int(match.group(1)) for i, text in enumerate(bundles) if (match := _EXIT.search(text))}
    program = _nest(sorted(spans, key=lambda span: (span[0], -span[1])), costs, exits)
    return Kernel(program, split="BarrierMegacore" in bundles_text)


def region_costs(kernel: Kernel, names: Sequence[str]) -> dict[str, ScheduleCost]:
    """{region: cost of one execution} of a kernel's main loop, plus "step" and "launch".

    names: the regions of main_loop with vector work, in program order: one per `pl.when`, or the body of a kernel
    without one. A `pl.when` that the compiler predicated instead of branching, or that only starts copies, belongs to
    the step. "step" is everything else in the loop (a small loop in it counts once), "launch" everything outside it;
    together they add up to the kernel.
    Raises UnknownRegions if the kernel has other regions, and ValueError if one of them contains a loop.
    """
    regions = loop_regions(kernel)
    if len(regions) != len(names):
        regions_text = ", ".join(f"[{r.start:#x}, {r.end:#x}) of {r.total.bundles} bundles" for r in regions)
        raise UnknownRegions(
            f"the kernel's main loop has {len(regions)} vector regions ({regions_text}), expected {list(names)}"
        )
    for name, region in zip(names, regions, strict=True):
        if any(inner.loop for inner in region.walk()):
            raise ValueError(f"region {name} holds a loop, whose trips are not known")
    return {name: region.total for name, region in zip(names, regions, strict=True)} | step_and_launch(kernel)


def loop_regions(kernel: Kernel) -> list[Region]:
    """The regions of main_loop with vector work, in program order."""
    main = main_loop(kernel)
    # A pipeline guards the kernel's body; the loop's other branches are then copies (of operands in VMEM: by vectors).
    guards = [region for region in main.inside if len(_vector_regions(region)) > 1]
    return [leaf for region in guards or main.inside for leaf in _vector_regions(region)]


def step_and_launch(kernel: Kernel) -> dict[str, ScheduleCost]:
    """{"step": all of main_loop but loop_regions, "launch": all of the kernel but main_loop}."""
    main = main_loop(kernel)
    return {
        "step": _minus(main.total, (region.total for region in loop_regions(kernel))),
        "launch": _minus(kernel.program.total, [main.total]),
    }


def main_loop(kernel: Kernel) -> Region:
    """The loop over the grid, or an inner loop with most of its bundles. Raises ValueError if there is none."""
    main = _dearest_loop(kernel)
    if not main.loop:
        raise ValueError("the kernel has no main loop")
    return main


def product_loop(kernel: Kernel) -> Region:
    """The only loop that has matrix products and no other such loop inside; the whole kernel, if no loop has any."""
    loops = [region for region in kernel.program.walk() if region.loop and region.total.mxu_cycles]
    inner = [loop for loop in loops if not any(other in loops and other is not loop for other in loop.walk())]
    (found,) = inner or [kernel.program]
    return found


def counted_cycles(kernel: Kernel, contracted: int = 1) -> float | None:
    """Cycles of one run on a core, of a program whose loops count to constants; None for another.

    contracted: tiles that a matrix product sums up per tile of its result. A branch without matrix instructions, in a
    loop with them, is taken for the end of such a sum; every other branch is taken for entered. A small loop to an
    unknown count, as for what is left of a copy, counts once.
    """
    whole = kernel.program.total.bundles

    def cycles(region: Region) -> float:
        total = region.own.cycles
        for inner in region.inside:
            ends = contracted if region.own.mxu_cycles and not inner.loop and not inner.total.mxu_cycles else 1
            total += cycles(inner) / ends
        return total * (region.trips or 1)

    if any(r.loop and r.trips is None and r.total.bundles > _SMALL * whole for r in kernel.program.walk()):
        return None
    return cycles(kernel.program)


def grid_cycles(kernel: Kernel, steps: int, cores: int) -> float:
    """Cycles per core, if `cores` cores share a grid of `steps` equal steps.

    A grid with one step per core is compiled without a loop: the program is that step.
    """
    main = _dearest_loop(kernel)
    return main.total.cycles * (steps / cores if main.loop else 1)


def _dearest_loop(kernel: Kernel) -> Region:
    """The innermost loop with most of the kernel's bundles, or the kernel itself without one."""
    main = kernel.program
    while loops := [r for r in main.walk() if r.loop and r != main and r.total.bundles > main.total.bundles / 2]:
        main = loops[0]
    return main


def _split_bundles(text: str) -> list[str]:
    bundles = []
    for line in text.splitlines():
        match = _ADDRESS.match(line)
        if match and int(match.group(1), 16) == len(bundles):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line  # a comment that goes on
    if not bundles:
        raise ValueError("no bundles in the dump")
    return bundles


def _bundle_costs(bundles: list[str], utilization_text: str, chip: Chip) -> list[ScheduleCost]:
    head, _, body = utilization_text.partition("== UTILIZATION:\n")
    units = head.splitlines()[1].replace(" ", "").split(",")
    rows = [list(map(int, line.split())) for line in body.splitlines() if line.strip()]
    if len(rows) < len(bundles):
        raise ValueError(f"{len(bundles)} bundles but utilization of {len(rows)}")
    costs = []
    for text, row in zip(bundles, rows, strict=False):
        dtypes = _MATMUL.findall(text)
        if unknown := set(dtypes) - _ROWS.keys():
            raise ValueError(f"matrix-unit instructions of unknown type: {', '.join(unknown)}")
        occupied = sum(_ROWS[dtype] / chip.rows_per_cycle for dtype in dtypes)
        costs.append(
            ScheduleCost(1, occupied / chip.matrix_units, {u: n for u, n in zip(units, row, strict=True) if n})
        )
    return costs


def _nest(spans: list[tuple[int, int, bool]], costs: list[ScheduleCost], exits: dict[int, int]) -> Region:
    """The tree of spans, which are sorted by start; the first one contains all others."""
    start, end, loop = spans[0]
    inside, rest = [], spans[1:]
    while rest:
        first_start, first_end, _ = rest[0]
        if first_end > end:
            raise ValueError(f"regions [{start:#x}, {end:#x}) and [{first_start:#x}, {first_end:#x}) overlap")
        count = next((i for i, span in enumerate(rest) if span[0] >= first_end), len(rest))
        inside.append(_nest(rest[:count], costs, exits))
        rest = rest[count:]
    covered = {i for region in inside for i in range(region.start, region.end)}
    own = [i for i in range(start, end) if i not in covered]
    trips = next((exits[i] for i in reversed(own) if i in exits), None) if loop else None
    return Region(start, end, loop, sum((costs[i] for i in own), ScheduleCost()), tuple(inside), trips)


def _vector_regions(region: Region) -> list[Region]:
    """The innermost regions with vector stores; a region that contains others is a guard."""
    inner = [leaf for inside in region.inside for leaf in _vector_regions(inside)]
    return inner or ([region] if region.total.slots.get("VSTORE", 0) >= _FEWEST_STORES else [])


def _minus(total: ScheduleCost, parts) -> ScheduleCost:
    for part in parts:
        slots = {unit: count - part.slots.get(unit, 0) for unit, count in total.slots.items()}
        total = ScheduleCost(total.bundles - part.bundles, total.mxu_cycles - part.mxu_cycles, slots)
    return total
