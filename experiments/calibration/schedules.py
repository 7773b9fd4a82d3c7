"""The Pallas kernels of a compiled step: grid, blocks, and the compiler's schedule of each region of their loop."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llada_jax.chips import Chip
from llada_jax.pod.aot import read_kernels
from llada_jax.pod.hlo import Module, Operation
from llada_jax.pod.schedule_reader import Kernel, Region, ScheduleCost, loop_regions, step_and_launch


def calls(module: Module) -> Iterator[tuple[str, Operation]]:
    """(computation, call) of the calls to Pallas kernels."""
    for name, operations in module.computations.items():
        yield from ((name, op) for op in operations if op.target == "tpu_custom_call")


def record(module: Module, dumps: Path, chip: Chip) -> dict[str, dict]:
    """{call: grid, blocks, options and schedule of its kernel}."""
    import mosaic  # needs the JAX that wrote the module

    read = read_kernels(dumps, [op.name for _, op in calls(module)], chip)
    by_body = {mosaic.body(op): _schedule(read[op.name]) for _, op in calls(module) if op.name in read}
    return {op.name: dataclasses.asdict(mosaic.grid(op)) | by_body[mosaic.body(op)] for _, op in calls(module)}


def _schedule(kernel: Kernel) -> dict:
    regions = [
        {
            "matmuls": region.total.mxu_cycles > 0,
            "once": _outside_loops(region).cycles,
            "looped": _in_loops(region).cycles,
        }
        for region in loop_regions(kernel)
    ]
    return {"split": kernel.split, "regions": regions} | {n: cost.cycles for n, cost in step_and_launch(kernel).items()}


def _in_loops(region: Region) -> ScheduleCost:
    if region.loop:
        return region.total
    return sum((_in_loops(inner) for inner in region.inside), ScheduleCost())


def _outside_loops(region: Region) -> ScheduleCost:
    if region.loop:
        return ScheduleCost()
    return sum((_outside_loops(inner) for inner in region.inside), region.own)
