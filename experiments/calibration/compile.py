"""Compiles the training step of a public run with MaxText and libtpu, and records what an estimate needs.

    python experiments/calibration/compile.py NAME       # in MaxText's environment, which calibrate.py makes

Writes compiled/CHIP/NAME.hlo.xz (the scheduled program) and compiled/CHIP/NAME.json (its kernels' schedules, memory,
mesh and MaxText's count of FLOPs). Takes 2 to 60 minutes and up to 10 GB.
"""

import importlib.metadata
import json
import lzma
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import schedules
from runs import RUNS, Run, recorded

from llada_jax.chips import parse_topology
from llada_jax.pod import aot, hlo

_PACKAGES = ("maxtext", "jax", "libtpu")
_ALWAYS = {"dataset_type": "synthetic", "enable_checkpointing": False, "run_name": "calibration"}
# The code of kernels, and where the source lies: no estimate reads them.
_UNREAD = re.compile(
    r'(?<="body":")[^"]*|(?<="debug_locations":")[^"]*| stack_frame_id=\d+| source_file="[^"]*"'
    r"| source_(?:end_)?(?:line|column)=\d+|^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*",
    re.MULTILINE,
)


def options(run: Run) -> list[str]:
    """MaxText's arguments. It names slices by TensorCores, as the cloud does."""
    topology = parse_topology(run.topology)
    hardware = f"{topology.chip.name}-{topology.chips * topology.chip.cores}"
    target = {"compile_topology": hardware, "compile_topology_num_slices": run.slices}
    return [f"{key}={value}" for key, value in (_ALWAYS | run.settings | target).items()]


def main(name: str) -> None:
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
        os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
        os.environ["LIBTPU_INIT_ARGS"] = f"{run.flags} {aot.dump_flags(Path(scratch, 'dumps'))}".strip()
        package, train_compile, utils = _maxtext()
        make_mesh, compile_step = train_compile.get_topology_mesh, train_compile.jit_and_compile
        made = []

        def making(config):
            made[:] = config, make_mesh(config)
            return made[1]

        def recording(*arguments, **keywords):
            start = time.time()
            compiled = compile_step(*arguments, **keywords)
            config, mesh = made
            counted = utils.calculate_tflops_training_per_device(config, log=False)
            _write(name, compiled, mesh, counted, config.num_experts, Path(scratch, "dumps"), time.time() - start)
            return compiled

        train_compile.get_topology_mesh, train_compile.jit_and_compile = making, recording
        base = Path(package.__path__[0], "configs", "base.yml")
        arguments = [sys.argv[0], str(base), *options(run), f"base_output_directory={scratch}/maxtext"]
        from absl import app

        app.run(train_compile.main, arguments)


def _maxtext():
    """(package, its module that compiles a step, that of FLOPs); they moved in 0.2.0."""
    try:
        import maxtext
        from maxtext.trainers.pre_train import train_compile
        from maxtext.utils import maxtext_utils
    except ImportError:
        import MaxText as maxtext
        from MaxText import maxtext_utils, train_compile
    return maxtext, train_compile, maxtext_utils


def _write(name: str, compiled, mesh, counted, experts: int, dumps: Path, seconds: float) -> None:
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    module, chip = hlo.parse(text), parse_topology(RUNS[name].topology).chip
    tflops, _, attention = counted
    values = {
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "compile_seconds": round(seconds),
        "memory": {key: getattr(analysis, key) for key in dir(analysis) if key.endswith("_in_bytes")},
        "tflops": tflops,
        "attention_tflops": attention,
        "experts": experts,
        "mesh": mesh_places(mesh),
        "cycles": aot.operation_cycles(module, dumps, chip),
        "kernels": schedules.record(module, dumps, chip),
    }
    program, known = recorded(name)
    program.parent.mkdir(parents=True, exist_ok=True)
    short = lzma.compress(_UNREAD.sub("", text).encode(), preset=9 | lzma.PRESET_EXTREME)
    program.write_bytes(short)
    known.write_text(json.dumps(values) + "\n")


def mesh_places(mesh) -> dict:
    """Sizes of the axes, and of each device in the program's order its coordinates and slice."""
    devices = mesh.devices.reshape(-1)
    return {
        "axes": dict(mesh.shape),
        "coordinates": [list(device.coords) for device in devices],
        "slices": [getattr(device, "slice_index", 0) for device in devices],
    }


if __name__ == "__main__":
    main(sys.argv[1])
