"""Score, tokens per forward and tokens per second with and without CAP (the form of the paper's Figure 3).

    python experiments/post_training/throughput.py [FOLDER]      (FOLDER: runs/post_training, as run.sh leaves it)

For each seed in FOLDER, the model of CAP and the one of as many steps more of SFT answer the same test questions, in
turns, in blocks of 16 at threshold 0.95. Seconds are of processor time, so that other work on the machine counts
little. The fastest of three rounds counts, compilation does not. Writes results/throughput.json and .svg beside this
file, and prints the table.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from report import mean

from llada_jax import plots

HERE = Path(__file__).resolve().parent
STAGES = {"sft_longer": "SFT, equal steps", "cap": "CAP"}
MEASURES = {
    "score": ("right answers, %", 100, 1),
    "tokens_per_forward": ("tokens per forward", 1, 2),
    "tokens_per_second": ("tokens a second", 1, 0),
}
QUESTIONS, BATCH, ROUNDS = 500, 125, 3


def measure(folder: Path) -> list[dict]:
    """A row for each seed and stage."""
    import task

    from llada_jax.checkpoint.weights import load_checkpoint
    from llada_jax.evaluation.tasks import answer_questions, reasoning_gym_questions
    from llada_jax.sampling.generate import GenerateConfig

    questions = reasoning_gym_questions(task.NAME, QUESTIONS, task.TEST_SEED, task.SETTINGS)
    decoding = GenerateConfig(gen_length=32, block_length=16, steps=16, threshold=0.95, eos_early_stop=True)
    rows = []
    for seed in sorted(path.name for path in folder.iterdir() if (path / "cap").exists()):
        models = {stage: load_checkpoint(str(folder / seed / stage)) for stage in STAGES}
        answer_questions(models["cap"], questions[:BATCH], decoding, BATCH)  # compiles
        timed = {stage: [] for stage in STAGES}
        for stage in list(STAGES) * ROUNDS:
            begin = time.process_time()
            result, _ = answer_questions(models[stage], questions, decoding, BATCH)
            timed[stage].append((time.process_time() - begin, result))
        for stage, rounds in timed.items():
            seconds, best = min(rounds, key=lambda entry: entry[0])
            speed = best.answer_tokens / seconds
            row = {"seed": int(seed), "stage": stage, "score": best.score}
            rows.append(row | {"tokens_per_forward": best.tokens_per_forward, "tokens_per_second": speed})
            print(rows[-1], flush=True)
    return rows


def values(rows: list[dict], stage: str, name: str) -> np.ndarray:
    """Of the seeds, in order."""
    return np.array([row[name] for row in rows if row["stage"] == stage])


def table(rows: list[dict]) -> str:
    """Markdown; mean ± standard error over seeds."""
    lines = [f"| | {' | '.join(title for title, *_ in MEASURES.values())} |", "|---" * (len(MEASURES) + 1) + "|"]
    for stage, title in STAGES.items():
        cells = [mean(scale * values(rows, stage, name), digits) for name, (_, scale, digits) in MEASURES.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    ratios = [
        mean(values(rows, "cap", name) / values(rows, "sft_longer", name), 2)
        for name in ("tokens_per_forward", "tokens_per_second")
    ]
    return "\n".join([*lines, "", f"CAP writes {ratios[0]} times the tokens per forward and {ratios[1]} a second."])


def draw(rows: list[dict], path: str) -> None:
    pyplot = plots.open_pyplot()

    figure, panels = pyplot.subplots(1, len(MEASURES), figsize=(9, 3), layout="constrained")
    for axes, (name, (title, scale, _)) in zip(panels, MEASURES.items(), strict=True):
        for place, (stage, color) in enumerate(zip(STAGES, ("#98a2b3", plots.COLORS[0]), strict=True)):
            scaled = scale * values(rows, stage, name)
            error = np.std(scaled, ddof=1) / len(scaled) ** 0.5 if len(scaled) > 1 else None
            axes.bar(place, scaled.mean(), 0.6, yerr=error, color=color, capsize=3)
        axes.set(title=title, xticks=range(len(STAGES)), xticklabels=STAGES.values())
        plots.trim(axes)
    plots.save(figure, path)


def main(folder: str = "runs/post_training") -> None:
    rows = measure(Path(folder))
    if not rows:
        sys.exit(f"error: {folder}: no seed with a model of CAP; run experiments/post_training/run.sh SEED")
    out = HERE / "results" / "throughput.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, str(out.with_suffix(".svg")))
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
