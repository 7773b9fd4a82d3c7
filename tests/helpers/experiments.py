"""The modules of experiments/NAME, which is a folder of programs and not a package."""

import contextlib
import importlib
import sys

from tests.helpers.paths import ROOT

EXPERIMENTS = ROOT / "experiments"


@contextlib.contextmanager
def importable(*folders: str):
    """Inside, modules of experiments/FOLDER are imported by their bare names, as when a script there runs."""
    paths = [str(EXPERIMENTS / folder) for folder in folders]
    before = list(sys.path)
    sys.path[:0] = paths
    try:
        yield
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):  # folders have modules of the same name
            if name != "__main__" and str(getattr(module, "__file__", None)).startswith(str(EXPERIMENTS)):
                del sys.modules[name]


def load(folder: str, name: str):
    """The module experiments/FOLDER/NAME.py, newly imported."""
    with importable(folder):
        return importlib.import_module(name)
