"""Writes the table and the picture of results/ into llada_jax/pod/README.md, between its marks, and the band that all
estimates print to llada_jax/pod/calibration.json.

python experiments/calibration/report.py
"""

import json
import re
from pathlib import Path

import numpy as np
from runs import RUNS

from llada_jax import plots

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER.parents[1] / "llada_jax" / "pod" / "README.md"
PICTURE = RESULTS / "calibration.svg"
BAND = README.with_name("calibration.json")
_BEGIN, _END = "<!-- calibration -->\n", "<!-- end of calibration -->"
_GB = 1e9


def read() -> list[dict]:
    """The recorded results of runs that were timed, in the order of runs.py."""
    files = (RESULTS / f"{name}.json" for name, run in RUNS.items() if run.half != "untimed")
    return [json.loads(path.read_text()) for path in files if path.exists()]


def ratio(result: dict) -> float:
    """Predicted over measured seconds."""
    return result["predicted_seconds"] / result["measured_seconds"]


def band(results: list[dict], half: str = "test") -> tuple[float, float, float, float]:
    """Smallest, median and largest ratio of a half, and the share of its points within 0.85 to 1.15."""
    ratios = np.array([ratio(result) for result in results if result["half"] == half])
    return ratios.min(), float(np.median(ratios)), ratios.max(), float(((ratios >= 0.85) & (ratios <= 1.15)).mean())


def written_band(results: list[dict]) -> dict:
    """What pod/report.py prints: of all timed runs, while few of those set aside for testing are compiled."""
    ratios = np.array([ratio(result) for result in results])
    chips = sorted({result["topology"].split(":")[0] for result in results})
    rounded = {"least": ratios.min(), "median": np.median(ratios), "most": ratios.max()}
    return {"runs": len(ratios), "chips": chips} | {name: round(float(value), 2) for name, value in rounded.items()}


def table(results: list[dict]) -> str:
    """Markdown, a row per run."""
    head = (
        "run", "slice", "half", "attention", "experts", "dense", "glue", "collectives", "predicted, s", "measured, s",
        "ratio", "GB a device",
    )  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        parts = result["parts"]
        slices = f"{result['slices']} x " if result["slices"] > 1 else ""
        measured = f" ({result['measured_bytes'] / _GB:.1f})" if result["measured_bytes"] else ""
        cells = (
            result["model"],
            slices + result["topology"],
            result["half"],
            *(f"{parts[part]:.2f}" for part in ("attention", "experts", "dense", "glue", "collectives")),
            f"{result['predicted_seconds']:.2f}",
            f"{result['measured_seconds']:.2f}",
            f"**{ratio(result):.2f}**",
            f"{result['predicted_bytes'] / _GB:.1f}{measured}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def words(results: list[dict]) -> str:
    """What the two halves show, and the runs set apart."""
    lines = []
    for half in sorted({result["half"] for result in results}):
        low, median, high, near = band(results, half)
        count = sum(result["half"] == half for result in results)
        total = sum(run.half == half for run in RUNS.values())
        lines.append(
            f"- {half}, {count} of {total} runs compiled so far: predicted over measured {low:.2f} to {high:.2f}, "
            f"median {median:.2f}, {near:.0%} within 0.85 to 1.15"
        )
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """Predicted against measured seconds, a mark per run."""
    pyplot = plots.open_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    ends = np.array([0.5, 50.0])
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#e4e7ec", label="within 10%")
    axes.plot(ends, ends, color="#98a2b3", linewidth=1)
    chips = sorted({result["topology"].split(":")[0] for result in results})
    for color, chip in zip(plots.COLORS, chips, strict=False):
        for half, marker in (("fit", "o"), ("test", "s"), ("apart", "x")):
            of_chip = [r for r in results if r["topology"].startswith(f"{chip}:") and r["half"] == half]
            axes.plot(
                [r["measured_seconds"] for r in of_chip], [r["predicted_seconds"] for r in of_chip], marker,
                color=color, markersize=7, markerfacecolor="none" if half == "fit" else color, linestyle="none",
                label=f"{chip}, {half}" if of_chip else None,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="measured seconds of a step", ylabel="predicted", xlim=ends, ylim=ends)
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.set_yticks(ticks, map(str, ticks), minor=False)
    axes.minorticks_off()
    plots.trim(axes)
    axes.legend(frameon=False, fontsize=8)
    plots.save(figure, path)


def section(results: list[dict]) -> str:
    """What stands between the marks of the README."""
    picture = PICTURE.relative_to(FOLDER.parents[1])
    return f"![Predicted against measured seconds of a step](../../{picture})\n\n{table(results)}\n\n{words(results)}\n"


def main() -> None:
    results, text = read(), README.read_text()
    draw(results, PICTURE)
    new = f"{_BEGIN}{section(results)}{_END}"
    README.write_text(re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: new, text, flags=re.DOTALL))
    BAND.write_text(json.dumps(written_band(results), indent=1) + "\n")
    print(words(results))


if __name__ == "__main__":
    main()
