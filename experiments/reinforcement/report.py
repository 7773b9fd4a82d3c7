"""The table and the picture of the recorded seeds.

    python experiments/reinforcement/report.py        # results/*.json -> a table, and results/reinforcement.svg

Mean ± standard error over seeds; with one seed, that over its questions, in brackets. Changes are taken within a seed.
"""

import json
from pathlib import Path

import numpy as np

from llada_jax import plots

RESULTS = Path(__file__).with_name("results")
NAMES = {
    "sft": "SFT",
    "sft_trajectory": "SFT, then by trajectories",
    "sft_elbo": "SFT, then by the ELBO",
    "cap": "CAP",
    "cap_trajectory": "CAP, then by trajectories",
    "cap_elbo": "CAP, then by the ELBO",
    "dpo": "CAP, then DPO",
}


def seeds() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("[0-9]*.json"))]


def mean(values: np.ndarray, digits: int, error: float | None = None) -> str:
    """error: of a single value."""
    if len(values) > 1:
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"
    return f"{values.mean():.{digits}f}" + (f" (± {error:.{digits}f})" if error is not None else "")


def table(found: list[dict]) -> str:
    lines = [
        "| model | seeds | right answers, % | change, points | tokens per forward | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in NAMES.items():
        having = [seed for seed in found if name in seed]
        if not having:
            continue
        start = name.partition("_")[0]
        score = np.array([100 * seed[name]["score"] for seed in having])
        before = np.array([100 * seed[start]["score"] for seed in having])
        tokens = np.array([seed[name]["tokens_per_forward"] for seed in having])
        first = having[0][name]
        change = mean(score - before, 1) if "_" in name else ""
        minutes = mean(np.array([seed[name]["minutes"] for seed in having]), 0) if "minutes" in first else ""
        cells = (
            mean(score, 1, 100 * first["score_stderr"]), change,
            mean(tokens, 2, first["tokens_per_forward_stderr"]), minutes,
        )  # fmt: skip
        lines.append(f"| {label} | {len(having)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: list[dict], path: Path) -> None:
    """Reward and tokens per forward of the answers drawn in training, over its steps: means of five steps."""
    pyplot = plots.open_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, key, label in zip(
        axes, ("reward", "tokens_per_forward"), ("mean reward", "tokens per forward"), strict=True
    ):
        for color, name in zip(plots.COLORS, (name for name in NAMES if "_" in name), strict=False):
            curves = [[row[key] for row in seed[name]["curve"]] for seed in found if name in seed]
            if curves:
                smooth = np.mean([np.convolve(curve, np.ones(5) / 5, "valid") for curve in curves], axis=0)
                axis.plot(np.arange(len(smooth)) + 3, smooth, color=color, label=NAMES[name])
        axis.set(xlabel="step", ylabel=label)
        plots.trim(axis)
    axes[0].legend(fontsize=7)
    plots.save(figure, str(path), bbox_inches="tight")


def main() -> None:
    found = seeds()
    if not found:
        print(f"{RESULTS}: no seed is recorded")
        return
    print(table(found))
    draw(found, RESULTS / "reinforcement.svg")


if __name__ == "__main__":
    main()
