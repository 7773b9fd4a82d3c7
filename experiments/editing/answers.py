"""Accuracy and tokens per forward of a variant over thresholds, by plain decoding and by decoding that edits.

    python experiments/editing/answers.py --checkpoint=DIR --variant=NAME --results=FILE.json [--questions=500]

Answers the test questions of experiments/post_training once per setting, and adds them to the file; those that are
there already are not answered again.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags
from config import THRESHOLDS, VARIANTS

from llada_jax import command_line
from llada_jax.errors import InputError

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_VARIANT = flags.DEFINE_string("variant", None, "Name in config.VARIANTS.")
_RESULTS = flags.DEFINE_string("results", None, "JSON file of the seed's numbers.")
_QUESTIONS = flags.DEFINE_integer("questions", 500, "Of the test.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 128, "Questions decoded together.", lower_bound=1)


def settings_of(variant) -> list[dict]:
    """The decoding settings of a variant. Edits at any difference, as LLaDA2.1's speed mode has it, and at 0.5."""
    plain = [{"rule": "sglang", "threshold": t, "active_blocks": n} for n in variant.active for t in THRESHOLDS]
    if variant.block != 16:
        return plain
    edited = [
        {"rule": "llada2.1", "threshold": t, "editing_threshold": e, "active_blocks": 1}
        for e in (0.0, 0.5) for t in THRESHOLDS
    ]  # fmt: skip
    return plain + edited


def main(argv) -> None:
    del argv
    if not (_CHECKPOINT.value and _RESULTS.value and _VARIANT.value in VARIANTS):
        raise InputError(f"--checkpoint=DIR, --results=FILE and --variant, one of {', '.join(VARIANTS)}, are required")
    path, variant = Path(_RESULTS.value), VARIANTS[_VARIANT.value]
    results = json.loads(path.read_text()) if path.exists() else {}
    answered = results.setdefault(_VARIANT.value, [])
    known = [{name: row[name] for name in row["settings"]} for row in answered]
    missing = [settings for settings in settings_of(variant) if settings not in known]
    for row in answer(_CHECKPOINT.value, variant, missing):
        answered.append(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def answer(checkpoint: str, variant, missing: list[dict]):
    """Yields a row per setting."""
    if not missing:
        return
    import task  # of experiments/post_training

    from llada_jax.checkpoint.weights import load_checkpoint
    from llada_jax.evaluation.tasks import answer_questions, reasoning_gym_questions
    from llada_jax.sampling.generate import GenerateConfig

    model = load_checkpoint(checkpoint)
    questions = reasoning_gym_questions(task.NAME, _QUESTIONS.value, task.TEST_SEED, task.SETTINGS)
    for settings in missing:
        how = GenerateConfig(gen_length=32, block_length=variant.block, eos_early_stop=True, **settings)
        begin = time.process_time()
        result, _ = answer_questions(model, questions, how, _BATCH.value)
        row = settings | {
            "settings": list(settings),
            "questions": len(questions),
            "score": result.score,
            "tokens_per_forward": result.tokens_per_forward,
            "cpu_seconds": round(time.process_time() - begin, 2),
        }
        print(settings, f"{result.score:.3f}, {result.tokens_per_forward:.2f}", flush=True)
        yield row


if __name__ == "__main__":
    command_line.run(main)
