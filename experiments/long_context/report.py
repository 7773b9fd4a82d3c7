"""Collects what run.sh measured into OUT.json, draws OUT.svg and prints the table.

python experiments/long_context/report.py FOLDER OUT
"""

import json
import sys
from pathlib import Path

from llada_jax import plots

FIELDS = (
    "checkpoint", "context", "yarn", "questions", "score", "score_stderr", "tokens_per_forward", "seconds",
    "peak_memory_bytes",
)  # fmt: skip


def collect(folder: Path) -> list[dict]:
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    rows = [{name: result[name] for name in FIELDS} for result in results]
    return sorted(rows, key=lambda row: (row["yarn"], row["context"]))


def table(rows: list[dict]) -> str:
    """Markdown. Seconds are per question; the time to compile is divided among the questions."""
    lines = [
        "| context, tokens | YaRN | right answers, % | questions | seconds a question | most memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        factor = "no" if row["yarn"] == 1 else f"x {row['yarn']:g}"
        lines.append(
            f"| {row['context']:,} | {factor} | {100 * row['score']:.0f} ± {100 * row['score_stderr']:.0f} "
            f"| {row['questions']} | {row['seconds'] / row['questions']:.1f} | {row['peak_memory_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: str) -> None:
    """Score and seconds per question over the length of the context; one line per YaRN factor."""
    pyplot = plots.open_pyplot()

    figure, (scores, seconds) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for factor, color in zip(sorted({row["yarn"] for row in rows}), plots.COLORS, strict=False):
        line = [row for row in rows if row["yarn"] == factor]
        contexts = [row["context"] for row in line]
        label = "no YaRN" if factor == 1 else f"YaRN x {factor:g}"
        right, error = ([100 * row[name] for row in line] for name in ("score", "score_stderr"))
        scores.errorbar(contexts, right, error, color=color, marker="o", markersize=4, capsize=2, label=label)
        cost = [row["seconds"] / row["questions"] for row in line]
        seconds.plot(contexts, cost, color=color, marker="o", markersize=4, label=label)
    ticks = sorted({row["context"] for row in rows})
    for axes, title in ((scores, "right answers, %"), (seconds, "seconds a question")):
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="context, tokens", xticks=ticks, xticklabels=[f"{tick:,}" for tick in ticks])
        plots.trim(axes)
    scores.set_ylim(-5, 105)
    seconds.set_yscale("log")
    scores.legend(frameon=False)
    plots.save(figure, path)


def main(folder: str, out: str) -> None:
    rows = collect(Path(folder))
    Path(f"{out}.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, f"{out}.svg")
    print(table(rows))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
