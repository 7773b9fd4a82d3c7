"""Compiles public runs of MaxText, estimates their steps, and writes the table of llada_jax/pod/README.md.

    python experiments/calibration/calibrate.py [NAME ...]         # without names, those that are not compiled yet

Names are those of runs.py. MaxText comes from PyPI by uv, with Python 3.12, into an environment per compiler under
runs/calibration/. A run compiles in 2 to 60 minutes and takes up to 10 GB.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import estimate
import report
from runs import COMPILERS, RUNS, recorded

from llada_jax import command_line
from llada_jax.errors import InputError
from llada_jax.pod import aot

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
WORK = ROOT / "runs" / "calibration"


def environment(compiler: str) -> Path:
    """The Python of an environment with MaxText and the packages of its day; made where there is none."""
    requirements, day = COMPILERS[compiler]
    folder = WORK / compiler
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        if not (uv := shutil.which("uv")):
            raise InputError("uv: not found; pip install uv")
        print(f"installing {' '.join(requirements)} of {day} into {folder}", flush=True)
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.12", folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python, "--exclude-newer", day]
        subprocess.run([*install, *requirements], check=True)
        ready.touch()
    return python


def compile_run(name: str) -> None:
    """Writes compiled/CHIP/NAME.*; raises InputError with the compiler's own line if it refuses the step."""
    python, log = environment(RUNS[name].compiler), WORK / f"{name}.log"
    print(f"{name}: compiling, log in {log}", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run(
            [python, FOLDER / "compile.py", name], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output,
            stderr=output,
        )  # fmt: skip
    if done.returncode:
        raise InputError(f"{name}: {aot.reason(log.read_text(), done.returncode)}; log in {log}")
    print(f"{name}: compiled in {time.monotonic() - start:.0f} s", flush=True)


def main(argv) -> None:
    if unknown := [name for name in argv[1:] if name not in RUNS]:
        raise InputError(f"{unknown[0]}: no such run; there are {', '.join(RUNS)}")
    for name in argv[1:] or [name for name in RUNS if not recorded(name)[1].exists()]:
        compile_run(name)
    estimate.main([""])
    report.main()


if __name__ == "__main__":
    command_line.run(main, more=True)
