"""The tables of the recorded seeds, and their picture.

    python experiments/editing/report.py        # results/*.json -> tables on the screen, results/editing.svg

Mean ± standard error over seeds. "Won back" is taken within a seed: of what the threshold costs plain SFT against its
own best threshold, the share that the variant with edits has more than SFT at that threshold.
"""

import json
from pathlib import Path

import numpy as np
from config import THRESHOLDS, VARIANTS

from llada_jax import plots

RESULTS = Path(__file__).with_name("results")
PLAIN, EDITED, HALF = ("sglang", None), ("llada2.1", 0.0), ("llada2.1", 0.5)  # rule and editing threshold
DECODING = {PLAIN: "no edits", EDITED: "edits at 0", HALF: "edits at 0.5"}


def seeds() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("[0-9]*.json"))]


def values(found: list[dict], variant: str, key: str, threshold: float, how=PLAIN, active: int = 1) -> np.ndarray:
    """Of each seed that has the setting."""
    rows = [row for seed in found for row in seed.get(variant, []) if row["active_blocks"] == active]
    rows = [row for row in rows if (row["rule"], row.get("editing_threshold")) == how]
    return np.array([row[key] for row in rows if row["threshold"] == threshold])


def mean(x: np.ndarray, digits: int, scale: float = 1.0) -> str:
    if not len(x):
        return ""
    error = f" ± {scale * x.std(ddof=1) / len(x) ** 0.5:.{digits}f}" if len(x) > 1 else ""
    return f"{scale * x.mean():.{digits}f}{error}"


def cell(found, *setting, **others) -> str:
    score = mean(values(found, setting[0], "score", *setting[1:], **others), 1, 100)
    return score and f"{score}; {mean(values(found, setting[0], 'tokens_per_forward', *setting[1:], **others), 2)}"


def thresholds_table(found: list[dict], variants=("sft", "edit")) -> str:
    columns = [(v, how) for v in variants for how in DECODING]
    lines = ["| threshold | " + " | ".join(f"{VARIANTS[v].label}, {DECODING[how]}" for v, how in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for threshold in THRESHOLDS:
        cells = (cell(found, v, threshold, how=how) for v, how in columns)
        lines.append(f"| {threshold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def won_back(found: list[dict], variant: str, threshold: float, how=EDITED) -> np.ndarray:
    plain = np.array([values([seed], "sft", "score", t) for seed in found for t in THRESHOLDS]).reshape(len(found), -1)
    cost = plain.max(axis=1) - plain[:, THRESHOLDS.index(threshold)]
    gain = values(found, variant, "score", threshold, how=how) - plain[:, THRESHOLDS.index(threshold)]
    return gain / cost


def ablation_table(found: list[dict], at=(0.5, 0.7)) -> str:
    lines = [
        "| | " + " | ".join(f"at {t}, edits at 0 | won back at {t}" for t in at) + " |",
        "|---|" + "---|---|" * len(at),
    ]
    for variant, its in VARIANTS.items():
        complete = [seed for seed in found if variant in seed and "sft" in seed]
        if its.block != 16 or not complete:
            continue
        cells = []
        for t in at:
            share = won_back(complete, variant, t)
            cells += [cell(found, variant, t, how=EDITED), f"{mean(share, 0, 100)} %"]
        lines.append(f"| {its.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def groups_table(found: list[dict]) -> str:
    names = [name for name, its in VARIANTS.items() if its.block != 16 and any(name in seed for seed in found)]
    columns = [(name, n) for name in names for n in VARIANTS[name].active]
    if not columns:
        return "of blocks in groups no seed is recorded"
    lines = ["| threshold | " + " | ".join(f"{VARIANTS[v].label}, {n} active" for v, n in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for threshold in THRESHOLDS:
        lines.append(f"| {threshold} | " + " | ".join(cell(found, v, threshold, active=n) for v, n in columns) + " |")
    return "\n".join(lines)


def draw(found: list[dict], path: Path) -> None:
    """Right answers over tokens per forward: a line per variant and decoding, thresholds along it."""
    pyplot = plots.open_pyplot()
    edited = [(v, how, 1, DECODING[how]) for v in ("sft", "edit", "oput") for how in (PLAIN, EDITED)]
    grouped = [(v, PLAIN, n, f"{n} active") for v in ("single", "group4") for n in (1, 2, 4)]
    panels = {"token editing, block 16": edited, "several blocks, block 4": grouped}
    panels = {title: [line for line in lines if _is_recorded(found, line)] for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for variant, how, n, what in lines:
            x, y = (
                [values(found, variant, key, t, how=how, active=n).mean() for t in THRESHOLDS]
                for key in ("tokens_per_forward", "score")
            )
            axis.plot(x, np.array(y) * 100, marker="o", markersize=3, label=f"{VARIANTS[variant].label}, {what}")
        axis.set(title=title, xlabel="tokens per forward")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("right answers, %")
    plots.save(figure, str(path), bbox_inches="tight")


def _is_recorded(found: list[dict], line) -> bool:
    variant, how, n, _ = line
    return all(len(values(found, variant, "score", t, how=how, active=n)) for t in THRESHOLDS)


def main() -> None:
    found = seeds()
    for table in (thresholds_table, ablation_table, groups_table):
        print(table(found), end="\n\n")
    draw(found, RESULTS / "editing.svg")


if __name__ == "__main__":
    main()
