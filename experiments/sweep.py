"""Trains once for each point of a grid or a list of config values: the command line of experiments/sweep/run.py."""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().with_suffix("")

if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
