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
from pathlib import Path

from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.pod.schedule_reader import Kernel, read_schedule

# Of the last pass only: a dump of all passes takes longer than the compiler.
_DUMP = "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=final_"
_KERNEL = re.compile(r"%([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"")


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
        dump = " ".join((f"--xla_jf_dump_to={dumps}", *_DUMP)) if schedules else ""
        command = [sys.executable, "-m", "llada_jax.pod.aot", target, json.dumps(arguments), topology, folder]
        env = {"LIBTPU_INIT_ARGS": dump, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # JAX writes programs for absent devices, and cannot load them
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raised = re.findall(r"^[\w.]*(?:Error|Exception): .*", done.stderr, re.MULTILINE)
            reason = raised[-1] if raised else f"the compiler died with code {done.returncode}"
            raise InputError(f"{target}({arguments}) for {topology}: {reason}")
        hlo = Path(folder, "program.hlo").read_text()
        kernels = {name: _read(dumps, name, chip) for name in _KERNEL.findall(hlo)} if schedules else {}
        return Program(hlo, json.loads(Path(folder, "memory.json").read_text())["temp_bytes"], kernels)


def _read(dumps: Path, kernel: str, chip) -> Kernel:
    def text(kind):
        (path,) = (p for p in dumps.glob(f"*-{kernel}-*-{kind}.txt") if "schedule-analysis" not in p.name)
        return path.read_text()

    return read_schedule(text("final_bundles"), text("final_hlo-static-per-bundle-utilization"), chip)


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
