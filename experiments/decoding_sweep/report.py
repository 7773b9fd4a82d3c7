"""Table and picture of what sweep.py recorded.

python experiments/decoding_sweep/report.py RESULTS.json [PICTURE.svg]
"""

import json
import sys
from pathlib import Path

from llada_jax import plots


def table(rows) -> str:
    """Markdown."""
    lines = ["| block | threshold | right answers, % | tokens per forward |", "|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['block']} | {row['threshold']} | {100 * row['score']:.1f} ± {100 * row['score_stderr']:.1f} "
            f"| {row['tokens_per_forward']:.2f} ± {row['tokens_per_forward_stderr']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows, path: str) -> None:
    """Score and tokens per forward over the threshold, one line per block size."""
    pyplot = plots.open_pyplot()

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    blocks, thresholds = (sorted({row[name] for row in rows}) for name in ("block", "threshold"))
    places = {threshold: place for place, threshold in enumerate(thresholds)}
    for shade, block in enumerate(blocks):
        line = [row for row in rows if row["block"] == block]
        color = pyplot.cm.viridis(0.9 * shade / max(len(blocks) - 1, 1))
        for axes, name, scale in ((panels[0], "score", 100), (panels[1], "tokens_per_forward", 1)):
            axes.errorbar(
                [places[row["threshold"]] for row in line],
                [scale * row[name] for row in line],
                [scale * row[f"{name}_stderr"] for row in line],
                color=color, marker="o", markersize=4, linewidth=1.5, capsize=2, label=f"block {block}",
            )  # fmt: skip
    for axes, title in zip(panels, ("right answers, %", "tokens per forward"), strict=True):
        axes.set(title=title, xlabel="threshold", xticks=range(len(thresholds)), xticklabels=thresholds)
        plots.trim(axes)
    panels[1].legend(frameon=False)
    plots.save(figure, path, bbox_inches="tight")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    recorded = json.loads(Path(sys.argv[1]).read_text())
    print(table(recorded))
    if sys.argv[2:]:
        draw(recorded, sys.argv[2])
