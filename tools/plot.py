"""Draws the curves of one or several runs from their metrics.

python tools/plot.py runs WORKDIR [WORKDIR ...] [--save=runs.svg] [--metric=loss]

Without --metric: the training loss with the phases and block sizes of the curriculum, the held-out NELBO at each block
size, and tokens a second. Workdirs may lie on gs://. Needs matplotlib: pip install -e '.[plot]'.
"""

import importlib.util
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.errors import InputError

_SAVE = flags.DEFINE_string("save", "runs.svg", "Picture, .svg or .png.")
_METRIC = flags.DEFINE_string("metric", None, "Draw this field of metrics.jsonl alone.")


def main(argv) -> None:
    if len(argv) < 3:
        raise InputError("runs WORKDIR [WORKDIR ...]: no workdir; see --help")
    if Path(_SAVE.value).suffix not in (".svg", ".png"):
        raise InputError(f"--save={_SAVE.value}, expected .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed; pip install 'llada_jax[plot]'")
    from llada_jax.monitoring.curves import draw_runs, read_runs

    draw_runs(read_runs(argv[2:]), _SAVE.value, _METRIC.value)
    print(_SAVE.value)


if __name__ == "__main__":
    command_line.run(main, commands=("runs",), more=True)
