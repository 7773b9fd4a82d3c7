"""Compiles a program ahead of time for one device of a TPU slice, without the slice, and reads the compiler's output.

An environment variable, which libtpu reads once when it is loaded, makes the compiler dump its schedules. So each
program is compiled in its own process: python -m llada_jax.pod.aot MODULE:FUNCTION ARGUMENTS_JSON TOPOLOGY FOLDER
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from llada_jax.chips import Chip, parse_topology
from llada_jax.errors import InputError
from llada_jax.pod.hlo import Module, Operation
from llada_jax.pod.operations import FREE
from llada_jax.pod.schedule_reader import Kernel, counted_cycles, read_schedule

_LAST_PASS = "final_"
_BUNDLES, _UTILIZATION = "final_bundles", "final_hlo-static-per-bundle-utilization"
_LONG_NAME = 100  # of an operation: libtpu 0.0.23 cuts it in the name of a file, and adds a hash
_KERNEL = re.compile(r"%([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"")


def dump_flags(folder: Path) -> str:
    """Flags for LIBTPU_INIT_ARGS: the compiler dumps the schedule of every operation into `folder`.

    Of the last pass only: a dump of all passes takes longer than the compiler.
    """
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_LAST_PASS}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its scheduled HLO, bytes of temporaries in HBM, and the schedule of each Pallas kernel."""

    hlo: str
    temp_bytes: int
    kernels: dict[str, Kernel]


def compile_program(
    target: str, arguments: dict, topology: str, schedules: bool = True, timeout: float = 900
) -> Program:
    """Compiles the program of `target(**arguments)`, "module:function", which returns (function, abstract arguments).

    Without `schedules` nothing is dumped, and `kernels` is empty. Raises InputError if libtpu is missing, or with the
    compiler's error if it refuses the program.
    """
    chip = parse_topology(topology).chip
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder, "dumps")
        dump = dump_flags(dumps) if schedules else ""
        command = [sys.executable, "-m", "llada_jax.pod.aot", target, json.dumps(arguments), topology, folder]
        env = {"LIBTPU_INIT_ARGS": dump, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # JAX writes programs for absent devices, and cannot load them
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise InputError(f"{target}({arguments}) for {topology}: {reason(done.stderr, done.returncode)}")
        hlo = Path(folder, "program.hlo").read_text()
        kernels = read_kernels(dumps, _KERNEL.findall(hlo), chip) if schedules else {}
        return Program(hlo, json.loads(Path(folder, "memory.json").read_text())["temp_bytes"], kernels)


def reason(stderr: str, code: int) -> str:
    """Why a process that compiles ended with `code`: the last exception that it wrote, in one line."""
    raised = re.findall(r"^[\w.]*(?:Error|Exception): .*", stderr, re.MULTILINE)
    return raised[-1] if raised else f"the compiler died with code {code}"


def read_kernels(dumps: Path, names: Iterable[str], chip: Chip) -> dict[str, Kernel]:
    """{operation: its schedule} of those of `names` that were dumped; of equal kernels, only one is."""
    files, kernels = _by_name(dumps), {}
    for name in names:
        texts = {}
        for stem, kinds in files.items():
            if stem == name or (len(stem) > _LONG_NAME and name.startswith(stem)):
                texts |= kinds
        if len(texts) == 2:
            kernels[name] = read_schedule(texts[_BUNDLES].read_text(), texts[_UTILIZATION].read_text(), chip)
    return kernels


def operation_cycles(module: Module, dumps: Path, chip: Chip) -> dict[str, float]:
    """{operation of XLA: cycles of one run on the busiest core, by its schedule}, where all its loops' trips are known.

    Copies run beside the schedule, and are not included. Of equal operations one is compiled, and dumped.
    """
    files, of_form, forms = _by_name(dumps), {}, {}
    for computation, operations in module.computations.items():
        for op in operations:
            if op.kind in FREE or op.target == "tpu_custom_call":
                continue
            forms[op.name] = _form(module, computation, op)
            if len(texts := files.get(op.name, {})) == 2:
                of_form[forms[op.name]] = _cycles(op, texts, chip)
    cycles = {name: of_form.get(form) for name, form in forms.items()}
    return {name: count for name, count in cycles.items() if count}


def _form(module: Module, computation: str, op: Operation) -> tuple:
    """What equal operations have in common: kinds and layouts of their operands, results and insides."""
    operands = (module.operand(computation, name).result_text for name in op.operands)
    return op.kind, op.result_text, *operands, *((inner.kind, inner.result_text) for _, inner in module.inside(op))


def _cycles(op: Operation, texts: dict[str, Path], chip: Chip) -> int | None:
    try:
        kernel = read_schedule(texts[_BUNDLES].read_text(), texts[_UTILIZATION].read_text(), chip)
    except ValueError:  # instructions of an unknown type
        return None
    bounds = re.search(r'"iteration_bounds":\[([^\]]+)\]', op.attributes)
    contracted = int(re.findall(r"\d+", bounds.group(1))[-1]) if bounds else 1
    counted = counted_cycles(kernel, contracted)
    return counted and round(counted)


def _by_name(dumps: Path) -> dict[str, dict[str, Path]]:
    """{operation: {kind: file}}."""
    files: dict[str, dict[str, Path]] = {}
    for path in dumps.iterdir():
        match = re.fullmatch(r"\d+-(.*?)(?:-\d{12,})?-\d\d-([a-z_-]+)\.txt", path.name)
        if match and match.group(2) in (_BUNDLES, _UTILIZATION):
            files.setdefault(match.group(1), {})[match.group(2)] = path
    return files


def _compile(target: str, arguments: str, topology: str, folder: str) -> None:
    import jax

    from llada_jax.pod.topology import one_device

    module, _, function = target.partition(":")
    make_program = getattr(importlib.import_module(module), function)
    mesh = one_device(parse_topology(topology))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):  # Pallas asks it for the chip, from the first trace on
        program, abstract = make_program(**json.loads(arguments))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract)
        compiled = jax.jit(program).lower(*abstract).compile()
    Path(folder, "program.hlo").write_text(compiled.as_text())
    memory = {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
    Path(folder, "memory.json").write_text(json.dumps(memory))


if __name__ == "__main__":
    _compile(*sys.argv[1:])
