"""Rehearses the launches of config.py for their slices, and prints a table of the results.

python experiments/pods/rehearse.py [NAME ...]       # e.g. mini_v5p; without names, all that have no result yet
python experiments/pods/rehearse.py --table          # of what is recorded in results/

A rehearsal takes minutes (tools/rehearse.py); its numbers, but for single operations, go to results/NAME.json.
Everything is compiler-estimated.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags
from config import LAUNCHES

from llada_jax import command_line
from llada_jax.errors import InputError

_TABLE = flags.DEFINE_bool("table", False, "Print the table of what is recorded, rehearse nothing.")

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
_GIB = 2**30


def command(name: str) -> list[str]:
    """The rehearsal of a launch, as the docstring of config.py has it."""
    launch = LAUNCHES[name]
    several = [f"--slices={launch.slices}"] if launch.slices > 1 else []
    return [
        "tools/rehearse.py",
        f"--config=experiments/pods/config.py:{name}",
        f"--topology={launch.topology}",
        *several,
    ]


def rehearse(name: str) -> None:
    """Writes results/NAME.json. Raises InputError when the step does not fit, or the rehearsal fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        print(f"python {' '.join(command(name))}", flush=True)
        if subprocess.run([sys.executable, *command(name), f"--json={out}"], cwd=ROOT).returncode:
            raise InputError(f"{name}: the rehearsal failed")
        values = json.loads(out.read_text())
    del values["per_op"]
    packages = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    launch = {"topology": LAUNCHES[name].topology, "slices": LAUNCHES[name].slices}
    text = json.dumps(launch | packages | values, indent=1)
    FOLDER.joinpath("results", f"{name}.json").write_text(text + "\n")


def recorded() -> dict[str, dict]:
    files = {name: FOLDER / "results" / f"{name}.json" for name in LAUNCHES}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def tokens_per_chip(values: dict) -> str:
    """Clean tokens per second and chip."""
    return f"{values['global_clean_tokens'] / sum(values['seconds'].values()) / values['chips']:,.0f}"


def summary(values: dict) -> str:
    """The line of a launch in the docstring of config.py."""
    seconds = sum(values["seconds"].values())
    memory, capacity = values["hbm_bytes"] / _GIB, values["hbm_capacity_bytes"] / _GIB
    return (
        f"{memory:.1f} of {capacity:.0f} GiB per chip, {seconds:.3f} s per step, "
        f"serial MFU {values['serial_mfu']:.1%}, {tokens_per_chip(values)} clean tokens per second and chip"
    )


def unhidden(values: dict) -> float:
    """Serial MFU if the collectives that run behind arithmetic were not hidden."""
    seconds = sum(values["seconds"].values())
    return values["serial_mfu"] * seconds / (seconds + values["hidden_seconds"])


def table(results: dict[str, dict]) -> str:
    """Markdown, one column per launch."""

    def row(label, cell):
        return f"| {label} | " + " | ".join(cell(values) for values in results.values()) + " |"

    def seconds(values, *parts):
        return ", ".join(f"{values['seconds'][part]:.3f}" for part in parts)

    def slices(values):
        return f"{values['slices']} x {values['topology']}" if values["slices"] > 1 else values["topology"]

    return "\n".join([
        "| | " + " | ".join(name.replace("_", ", ") for name in results) + " |",
        "|" + "---|" * (len(results) + 1),
        row("slices", slices),
        row("chips, rows a chip", lambda v: f"{v['chips']}, {v['rows_per_chip']:g}"),
        row("clean tokens a step", lambda v: f"{v['global_clean_tokens'] / 1e6:.2f} M"),
        row("memory of a chip, GiB", lambda v: f"{v['hbm_bytes'] / _GIB:.1f} of {v['hbm_capacity_bytes'] / _GIB:.0f}"),
        row("seconds: attention, experts", lambda v: seconds(v, "attention", "experts")),
        row("head, other matmuls", lambda v: seconds(v, "head", "dense")),
        row("glue", lambda v: seconds(v, "glue")),
        row("collectives (and hidden)", lambda v: f"{seconds(v, 'collectives')} ({v['hidden_seconds']:.3f})"),
        row("seconds in all", lambda v: f"{sum(v['seconds'].values()):.3f}"),
        row("serial MFU, overlapped MFU", lambda v: f"{v['serial_mfu']:.1%}, {v['overlapped_mfu']:.1%}"),
        row("serial MFU if nothing were hidden", lambda v: f"{unhidden(v):.1%}"),
        row("bound of that by weight traffic alone", lambda v: f"{v['weight_traffic_mfu']:.1%}"),
        row("share of the seconds by the bytes model", lambda v: f"{v['bytes_model_share']:.0%}"),
        row("clean tokens a second and chip", tokens_per_chip),
    ])  # fmt: skip


def main(argv) -> None:
    if unknown := [name for name in argv[1:] if name not in LAUNCHES]:
        raise InputError(f"{unknown[0]}: no such config here; there are {', '.join(LAUNCHES)}")
    names = argv[1:] or [name for name in LAUNCHES if name not in recorded()]
    for name in [] if _TABLE.value else names:
        rehearse(name)
    print(table(recorded()))


if __name__ == "__main__":
    command_line.run(main, more=True)
