"""Rehearses decoding on the slices of points.py and writes the tables of experiments/README.md.

python experiments/decode_pods/rehearse.py [SLICE ...]   # e.g. mini_v5p; without names, all points that have no result
python experiments/decode_pods/rehearse.py --table       # of what is recorded in results/

A rehearsal takes minutes (tools/rehearse.py --decode); its numbers, but for single operations, go to
results/SLICE.json. Everything is compiler-estimated.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import report
from absl import flags
from points import CANVAS, CHUNK, FILLED, LONGEST, POINTS, SLICES, Point

from llada_jax import command_line
from llada_jax.errors import InputError

_TABLE = flags.DEFINE_bool("table", False, "Write the tables of what is recorded, rehearse nothing.")

ROOT = Path(__file__).resolve().parents[2]


def mesh_of(point: Point, rows: int) -> dict[str, int]:
    """{axis: size} of the mesh that generate takes for so many requests."""
    from llada_jax.chips import parse_topology
    from llada_jax.model.config import preset
    from llada_jax.sampling import meshes

    topology, model = parse_topology(SLICES[point.slice].topology), preset(SLICES[point.slice].preset)
    return meshes.default(model, topology.num_devices, rows, topology.chip.hbm_bytes // topology.chip.devices)


def sizes_of(point: Point) -> dict[str, int]:
    """{flag of tools/rehearse.py: value}"""
    from llada_jax.chips import parse_topology

    if point.before is None:
        return dict(rows=point.rows, canvas=CANVAS, filled=FILLED)
    devices = parse_topology(SLICES[point.slice].topology).num_devices
    return dict(rows=devices, canvas=LONGEST, filled=point.before, prefill=CHUNK)


def command(point: Point) -> list[str]:
    """The rehearsal of a point."""
    from llada_jax.pod.decoding.meshes import arguments

    where, sizes = SLICES[point.slice], sizes_of(point)
    return [
        "tools/rehearse.py", "--decode", f"--config=configs/wsd.py:{where.preset}", f"--topology={where.topology}",
        *(f"--{name}={value}" for name, value in sizes.items()),
        *arguments(mesh_of(point, sizes["rows"])),
    ]  # fmt: skip


def rehearse(point: Point) -> None:
    """Adds a point to results/SLICE.json. Raises InputError when the rehearsal fails; that it does not fit is one."""
    with tempfile.TemporaryDirectory() as folder:
        out, line = Path(folder, "out.json"), command(point)
        print(f"python {' '.join(line)}", flush=True)
        done = subprocess.run([sys.executable, *line, f"--json={out}"], cwd=ROOT, capture_output=True, text=True)
        if not out.exists():
            raise InputError(f"{point.slice}, {point.key}: {done.stderr.strip().splitlines()[-1:]}")
        values = json.loads(out.read_text())
    values.pop("per_op", None)
    packages = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    mesh = {axis: size for axis, size in mesh_of(point, sizes_of(point)["rows"]).items() if size > 1}
    recorded = report.recorded(point.slice) | {point.key: packages | {"mesh": mesh} | values}
    report.path_of(point.slice).write_text(json.dumps(recorded, indent=1) + "\n")


def main(argv) -> None:
    if unknown := [name for name in argv[1:] if name not in SLICES]:
        raise InputError(f"{unknown[0]}: no such slice here; there are {', '.join(SLICES)}")
    asked = [point for point in POINTS if point.slice in argv[1:]]
    missing = [point for point in POINTS if point.key not in report.recorded(point.slice)]
    points = [] if _TABLE.value else asked or missing
    for number, point in enumerate(points, 1):
        print(f"{number} of {len(points)}: {point.slice}, {point.key}", flush=True)
        rehearse(point)
    report.write()


if __name__ == "__main__":
    command_line.run(main, more=True)
