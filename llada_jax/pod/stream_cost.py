"""The cost of streaming Pallas kernels: every step of the grid does the same work on its own blocks.

Per byte moved, such a kernel takes the longer of the copy at HBM bandwidth and its share of a step's schedule.
Compiler-estimated, not measured.
"""

from collections.abc import Iterable, Mapping

from llada_jax.chips import Chip, Topology
from llada_jax.pod import hlo
from llada_jax.pod.aot import Program, compile_program
from llada_jax.pod.hlo import Array
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.schedule_reader import grid_cycles
from llada_jax.pod.step_cost import KernelCost


def stream_costs(target: str, arguments: dict, steps: int, part: str, topology: Topology) -> dict[str, KernelCost]:
    """{name: cost of a call, with any number of steps} of the kernels that `target(**arguments)` runs.

    target: as in aot.compile_program. steps: of each kernel in that program. part: of step_cost.PARTS.
    """
    compiled = compile_program(target, arguments, topology.name)
    names = {name.split(".")[0] for name in compiled.kernels}
    return compiled_costs(compiled, dict.fromkeys(names, steps), part, topology.chip)


def compiled_costs(compiled: Program, steps: Mapping[str, int], part: str, chip: Chip) -> dict[str, KernelCost]:
    """As stream_costs, for a compiled program. steps: {kernel name: steps}."""
    module, costs = hlo.parse(compiled.hlo), {}
    for op in module.computations[module.entry]:
        for name, count in steps.items():
            if op.name in compiled.kernels and name in op.name:  # XLA adds what it was traced through
                kernel = compiled.kernels[op.name]
                arrays = [*op.result, *(x for y in op.operands for x in module.operand(module.entry, y).result)]
                cores = chip.cores_per_device if kernel.split else 1
                cycles = grid_cycles(kernel, count, cores)
                per_byte = max(cycles / chip.bundle_rate / _bytes(arrays), 1 / chip.stream_bandwidth)
                costs[name] = _kernel_cost(part, per_byte)
    return costs


def _kernel_cost(part: str, seconds: float) -> KernelCost:
    return lambda result, operands: (part, OperationCost(seconds * (_bytes(result) + _bytes(operands))))


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays)
