"""The cost of Pallas kernels that stream: each step of the grid reads and writes blocks of its own, and does the same.

Such a kernel takes, for every byte that it moves, the longer of the copy at HBM bandwidth and its share of a step's
schedule. Compiler-estimated, not measured.
"""

from llada_jax.pod import hlo
from llada_jax.pod.aot import compile_program
from llada_jax.pod.chips import Topology
from llada_jax.pod.hlo import Array
from llada_jax.pod.operations import Cost
from llada_jax.pod.schedule_reader import main_loop
from llada_jax.pod.step_cost import KernelCost


def stream_costs(target: str, arguments: dict, steps: int, part: str, topology: Topology) -> dict[str, KernelCost]:
    """{name: cost of a call, of any number of steps} of the kernels that `target(**arguments)` runs.

    target: as in aot.compile_program, a program in which each kernel takes so many steps; part: of step_cost.PARTS.
    """
    compiled = compile_program(target, arguments, topology.name)
    module, chip = hlo.parse(compiled.hlo), topology.chip
    per_byte = {}
    for op in module.computations[module.entry]:
        if op.target != "tpu_custom_call":
            continue
        kernel = compiled.kernels[op.name]
        cores = chip.cores_per_device if kernel.split else 1
        moved = _bytes(op.result) + sum(_bytes(module.operand(module.entry, name).result) for name in op.operands)
        cycles = main_loop(kernel).total.cycles * steps / cores
        per_byte[op.name.split(".")[0]] = max(cycles / chip.clock / moved, chip.devices / chip.hbm_bandwidth)
    return {name: _kernel_cost(part, seconds) for name, seconds in per_byte.items()}


def _kernel_cost(part: str, seconds: float) -> KernelCost:
    return lambda result, operands: (part, Cost(seconds * (_bytes(result) + _bytes(operands))))


def _bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)
