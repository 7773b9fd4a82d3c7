"""Estimates the recorded steps of public runs, and writes the estimates beside what was measured to results/.

    python experiments/calibration/estimate.py [NAME ...]          # without names, all of compiled/
    python experiments/calibration/estimate.py --largest=40 NAME   # and prints its largest operations

Needs neither MaxText nor a TPU compiler: compile.py recorded the programs. Compiler-estimated, not measured.
"""

import json
import lzma
from pathlib import Path

import numpy as np
from absl import flags
from runs import RUNS, Run, recorded

from llada_jax import command_line
from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.pod import hlo
from llada_jax.pod.collectives import Devices
from llada_jax.pod.step_cost import Line, part_seconds, step_lines

_LARGEST = flags.DEFINE_integer("largest", 0, "Print so many of the largest operations.", lower_bound=0)

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"


def lines_of(name: str) -> list[Line]:
    """The operations of a recorded step, with their costs on one device."""
    from kernels import costs  # imports JAX

    program, known = recorded(name)
    known, module = json.loads(known.read_text()), hlo.parse(lzma.decompress(program.read_bytes()).decode())
    topology, mesh = parse_topology(RUNS[name].topology), known["mesh"]
    coordinates = np.array(mesh["coordinates"])[:, : len(topology.shape)]
    devices = Devices(mesh["axes"], topology, coordinates, np.array(mesh["slices"]))
    kernels = costs(module, known["kernels"], topology.chip, known["experts"])
    return step_lines(module, topology.chip, kernels, devices, cycles=known["cycles"])


def measured_seconds(run: Run, known: dict) -> float | None:
    """Of a step: as published, or from the published rate and MaxText's count of FLOPs; None if it was not timed."""
    if run.tflops is None:
        return run.seconds
    tflops = known["tflops"] + (known["attention_tflops"] if run.attention_in_full else 0.0)
    return tflops / run.tflops


def result(name: str, lines: list[Line]) -> dict:
    """The content of results/NAME.json. Bytes are of a device."""
    run, known = RUNS[name], json.loads(recorded(name)[1].read_text())
    memory = known["memory"]
    arguments = memory["argument_size_in_bytes"] + memory["output_size_in_bytes"] - memory["alias_size_in_bytes"]
    return {
        "name": name,
        "model": run.settings.get("model_name", f"dense {run.settings.get('global_parameter_scale')}B"),
        "topology": run.topology,
        "slices": run.slices,
        "half": run.half,
        "parts": part_seconds(lines),
        "hidden_seconds": sum(line.hidden for line in lines if line.part == "collectives"),
        "predicted_seconds": sum(line.seconds for line in lines),
        "measured_seconds": measured_seconds(run, known),
        "predicted_bytes": arguments + memory["temp_size_in_bytes"],
        "measured_bytes": run.measured_bytes,
        "versions": known["versions"] | {"measured with jax": run.jax},
        "source": run.source,
        "date": run.date,
    }


def main(argv) -> None:
    compiled = [name for name in RUNS if recorded(name)[1].exists()]
    for name in argv[1:]:
        if name not in compiled:
            raise InputError(f"{name}: no such recorded step; there are {', '.join(compiled)}")
    RESULTS.mkdir(exist_ok=True)
    for name in argv[1:] or compiled:
        lines = lines_of(name)
        values = result(name, lines)
        RESULTS.joinpath(f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
        predicted, measured = values["predicted_seconds"], values["measured_seconds"]
        beside = f"measured {measured:.3f} ({predicted / measured:.2f})" if measured else "not timed"
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in values["parts"].items())
        memory = f"{values['predicted_bytes'] / 2**30:.1f} GiB a device"
        print(f"{name}: {predicted:.3f} s, {beside}: {parts}; {memory}", flush=True)
        for line in sorted(lines, key=lambda line: -line.seconds)[: _LARGEST.value]:
            print(f"  {line.seconds:8.4f} s ({line.hidden:.4f} hidden) {line.part:11} {line.name} {line.scope[-80:]}")


if __name__ == "__main__":
    command_line.run(main, more=True)
