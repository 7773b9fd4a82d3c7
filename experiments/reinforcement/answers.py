"""Right answers and tokens per forward of a model on the test of experiments/post_training, and how long it trained.

    python experiments/reinforcement/answers.py --checkpoint=DIR --name=NAME --results=FILE.json

Adds them to the file, unless they are there already.
"""

import json
import sys
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.errors import InputError

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_NAME = flags.DEFINE_string("name", None, "Of the model, in the results.")
_RESULTS = flags.DEFINE_string("results", None, "JSON file of the seed's numbers.")
_QUESTIONS = flags.DEFINE_integer("questions", 1000, "Of the test.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 128, "Questions decoded together.", lower_bound=1)


def main(argv) -> None:
    del argv
    if not (_CHECKPOINT.value and _RESULTS.value and _NAME.value):
        raise InputError("--checkpoint=DIR, --name=NAME and --results=FILE are required")
    path = Path(_RESULTS.value)
    results = json.loads(path.read_text()) if path.exists() else {}
    if _NAME.value in results:
        return
    results[_NAME.value] = answered(_CHECKPOINT.value) | trained(Path(_CHECKPOINT.value))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{_NAME.value}: {results[_NAME.value]}", flush=True)


def answered(checkpoint: str) -> dict:
    import task  # of experiments/post_training

    from llada_jax.checkpoint.weights import load_checkpoint
    from llada_jax.evaluation.tasks import answer_questions, reasoning_gym_questions
    from llada_jax.sampling.generate import GenerateConfig

    questions = reasoning_gym_questions(task.NAME, _QUESTIONS.value, task.TEST_SEED, task.SETTINGS)
    how = GenerateConfig(gen_length=32, block_length=16, threshold=0.95, eos_early_stop=True)
    result, _ = answer_questions(load_checkpoint(checkpoint), questions, how, _BATCH.value)
    names = ("questions", "score", "score_stderr", "tokens_per_forward", "tokens_per_forward_stderr")
    return {name: getattr(result, name) for name in names}


def trained(workdir: Path) -> dict:
    """{} of a model that was not trained by rewards."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    if not steps:
        return {}
    kept = ("step", "reward", "tokens_per_forward", "entropy", "drift_max", "groups_without_signal", "clip_share")
    minutes = steps[-1]["wall_seconds"]["step"] / 60
    return {"minutes": round(minutes, 1), "curve": [{name: row[name] for name in kept} for row in steps]}


if __name__ == "__main__":
    command_line.run(main)
