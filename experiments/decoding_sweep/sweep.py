"""Score and tokens per forward against threshold and block size, on a checkpoint (the form of the paper's Figure 4).

    python experiments/decoding_sweep/sweep.py --checkpoint=DIR --results=FILE.json [--picture=FILE.svg]

Answers the test questions of experiments/post_training once for each pair. The threshold is data of the decoding
program, so that a block size is compiled once. Pairs that --results holds already are not answered again.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

from llada_jax import command_line, plots
from llada_jax.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "post_training"))

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_RESULTS = flags.DEFINE_string("results", None, "JSON file of the numbers.")
_PICTURE = flags.DEFINE_string("picture", None, "Picture of them, .svg or .png.")
_THRESHOLDS = flags.DEFINE_list("thresholds", ["0.5", "0.7", "0.85", "0.9", "0.95", "0.99"], "In ascending order.")
_BLOCKS = flags.DEFINE_list("blocks", ["4", "8", "16", "32"], "Block sizes.")
_QUESTIONS = flags.DEFINE_integer("questions", 1000, "Of the test.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 64, "Questions decoded together.", lower_bound=1)


def main(argv) -> None:
    del argv
    if not _CHECKPOINT.value or not _RESULTS.value:
        raise InputError("--checkpoint=DIR and --results=FILE are required; see --help")
    try:
        pairs = [(int(block), float(threshold)) for block in _BLOCKS.value for threshold in _THRESHOLDS.value]
    except ValueError as error:
        raise InputError(f"--blocks, --thresholds: {error}") from error
    path = Path(_RESULTS.value)
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in sweep(
        _CHECKPOINT.value, [pair for pair in pairs if pair not in {(r["block"], r["threshold"]) for r in rows}]
    ):
        rows.append(row)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    rows.sort(key=lambda row: (row["block"], row["threshold"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if _PICTURE.value:
        draw(rows, _PICTURE.value)
        print(_PICTURE.value)


def sweep(checkpoint: str, pairs):
    """Yields the numbers of each (block, threshold)."""
    if not pairs:
        return
    import task  # of experiments/post_training

    from llada_jax.checkpoint.weights import load_checkpoint
    from llada_jax.evaluation.tasks import answer_questions, reasoning_gym_questions
    from llada_jax.sampling.generate import GenerateConfig

    model = load_checkpoint(checkpoint)
    questions = reasoning_gym_questions(task.NAME, _QUESTIONS.value, task.TEST_SEED, task.SETTINGS)
    for block, threshold in pairs:
        config = GenerateConfig(
            gen_length=32, block_length=block, steps=block, threshold=threshold, eos_early_stop=True
        )
        found, _ = answer_questions(model, questions, config, _BATCH.value)
        row = {"block": block, "threshold": threshold} | dataclasses.asdict(found)
        print(f"block {block:3}, threshold {threshold}: {found.score:.3f}, {found.tokens_per_forward:.2f}", flush=True)
        yield row


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
    """Score and tokens per forward over the threshold, a line for each block size."""
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
    command_line.run(main)
