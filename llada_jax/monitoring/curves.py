"""Plots of runs: metrics over steps, with the phases and block sizes of the curriculum marked."""

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from llada_jax import plots
from llada_jax.errors import InputError
from llada_jax.monitoring.metrics import read_rows

PANELS = ("loss", "nelbo", "tokens_per_second")
LABELS = {
    "loss": "training loss, nats per token",
    "nelbo": "held-out NELBO, nats per token",
    "tokens_per_second": "clean tokens per second",
    "mfu": "model FLOPs utilisation",
    "goodput": "share of wall time in useful steps",
    "mask_embedding_norm": "norm of the mask token's embedding",
    "expert_load_max": "busiest expert's tokens over the mean, worst layer",
    "expert_load_mean": "busiest expert's tokens over the mean, mean of layers",
    "hbm_peak_bytes": "most memory of a device so far, bytes",
}
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_NOT_DRAWN = {"step", "block_size", "phase"}


def read_runs(workdirs: Sequence[str | os.PathLike]) -> dict[str, list[dict]]:
    """{folder name: rows of metrics.jsonl} per run. Raises InputError naming a workdir without metrics."""
    paths = [os.path.normpath(workdir) if "://" not in str(workdir) else str(workdir) for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise InputError(f"{', '.join(paths)}: a run is named twice")
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        names = paths
    return {name: read_rows(path) for name, path in zip(names, paths, strict=True)}


def known_metrics(runs: dict[str, list[dict]]) -> list[str]:
    """Names of the numeric fields, which can be plotted."""
    rows = itertools.chain.from_iterable(runs.values())
    numeric = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    return sorted(numeric - _NOT_DRAWN)


def draw_runs(runs: dict[str, list[dict]], path: str, metric: str | None = None, x_label: str = "step") -> None:
    """Plots one metric, or a panel per metric of PANELS that the runs have, to a .svg or .png file.

    Each run has a colour, each block size of held-out rows a line style. Bands in the background show the phases of the
    first run. x_label: the label of the "step" axis. Raises InputError on an unknown metric, naming the known ones.
    """
    known = known_metrics(runs)
    if metric is not None and metric not in known:
        raise InputError(f"--metric={metric}, expected one of {', '.join(known)}")
    panels = [metric] if metric else [name for name in PANELS if name in known]
    if not panels:
        raise InputError(f"{', '.join(runs)}: none of {', '.join(PANELS)} in the metrics yet")
    pyplot = plots.open_pyplot()

    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.9 + 2.7 * len(panels)), sharex=True, squeeze=False, layout="constrained"
    )
    for place, (panel, name) in enumerate(zip(axes[:, 0], panels, strict=True)):
        _draw_panel(panel, runs, name)
        _draw_phases(panel, next(iter(runs.values())), labels=place == 0)
    axes[-1, 0].set_xlabel(x_label)
    plots.save(figure, path)


def _draw_panel(panel, runs: dict[str, list[dict]], name: str) -> None:
    styles: dict[int | None, object] = {}
    for number, (run, rows) in enumerate(runs.items()):
        color = plots.COLORS[number % len(plots.COLORS)]
        for size, (steps, values, errors) in _series(rows, name).items():
            style = styles.setdefault(size, _LINES[len(styles) % len(_LINES)])
            label = run if size is None else f"{run}, block {size}"
            if errors is None and size is None:
                panel.plot(steps, values, color=color, linewidth=1.4, label=label)
            else:
                panel.errorbar(steps, values, errors, color=color, linestyle=style, linewidth=1.4, marker="o",
                               markersize=3.5, capsize=2, elinewidth=0.8, label=label)  # fmt: skip
    panel.set_ylabel(LABELS.get(name, name.replace("_", " ")))
    plots.trim(panel)
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _series(rows: Sequence[dict], name: str) -> dict[int | None, tuple[list, list, list | None]]:
    """{block size of held-out rows, or None for training rows: (steps, values, standard errors or None)}."""
    series: dict[int | None, tuple[list, list, list | None]] = {}
    for row in rows:
        if isinstance(row.get(name), int | float):
            size = None if "phase" in row else row.get("block_size")
            steps, values, errors = series.setdefault(size, ([], [], [] if f"{name}_stderr" in row else None))
            steps.append(row["step"])
            values.append(row[name])
            if errors is not None:
                error = row.get(f"{name}_stderr")
                errors.append(math.nan if error is None else error)  # a single row has no standard error
    return series


def phases_of(rows: Sequence[dict]) -> list[tuple[str, int, int, int]]:
    """[(phase, block size, step before it, last step)] of the training rows, in order."""
    steps = [(row["phase"], row["block_size"], row["step"]) for row in rows if "phase" in row]
    phases, begin = [], 0
    for (phase, size), group in itertools.groupby(steps, key=lambda step: step[:2]):
        *_, (_, _, end) = group
        phases.append((phase, size, begin, end))
        begin = end
    return phases


def _draw_phases(panel, rows: Sequence[dict], labels: bool) -> None:
    phases = phases_of(rows)
    whole = max((end for *_, end in phases), default=0)
    for number, (phase, size, begin, end) in enumerate(phases):
        panel.axvspan(begin, end, color="#667085", alpha=0.10 if number % 2 else 0.03, linewidth=0, zorder=0)
        if labels:
            wide = end - begin > 0.09 * whole
            text = f"{phase}\nblock {size}" if wide else str(size)
            panel.annotate(text, ((begin + end) / 2, 1.01), xycoords=("data", "axes fraction"), ha="center",
                           va="bottom", fontsize=7.5, color="#475467", annotation_clip=False)  # fmt: skip
