"""Score and tokens per forward against threshold and block size, on a checkpoint (the form of the paper's Figure 4).

    python experiments/decoding_sweep/sweep.py --checkpoint=DIR --results=FILE.json [--picture=FILE.svg]

Answers the test questions of experiments/post_training once per pair. The threshold is data of the decoding program, so
that each block size is compiled once. Pairs that are in --results already are not answered again.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags
from report import draw, table

from llada_jax import command_line
from llada_jax.errors import InputError

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))

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
        result, _ = answer_questions(model, questions, config, _BATCH.value)
        row = {"block": block, "threshold": threshold} | dataclasses.asdict(result)
        print(
            f"block {block:3}, threshold {threshold}: {result.score:.3f}, {result.tokens_per_forward:.2f}", flush=True
        )
        yield row


if __name__ == "__main__":
    command_line.run(main)
