"""Tokens per second with one, two and four active blocks, one question at a time, in turn.

    python experiments/editing/speed.py CHECKPOINT [THRESHOLD [QUESTIONS [ROUNDS]]]

CHECKPOINT: of a variant with blocks of 4. The least of ROUNDS (5) rounds over QUESTIONS (50) of the test, after one
that compiles; beside it tokens per forward and right answers, which the same threshold gives.
"""

import sys
import time
from pathlib import Path

from config import GROUP_BLOCK

from llada_jax.checkpoint.weights import load_checkpoint
from llada_jax.evaluation.tasks import answer_questions, reasoning_gym_questions
from llada_jax.sampling.generate import GenerateConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))
import task  # noqa: E402 (of experiments/post_training)

ACTIVE = (1, 2, 4)


def main(checkpoint: str, threshold: float, count: int, rounds: int) -> None:
    model = load_checkpoint(checkpoint)
    questions = reasoning_gym_questions(task.NAME, count, task.TEST_SEED, task.SETTINGS)
    seconds = {active: [] for active in ACTIVE}
    results = {}
    for _ in range(rounds + 1):
        for active in ACTIVE:
            how = GenerateConfig(
                gen_length=32, block_length=GROUP_BLOCK, eos_early_stop=True, rule="sglang", threshold=threshold,
                active_blocks=active,
            )  # fmt: skip
            begin = time.perf_counter()
            results[active], _ = answer_questions(model, questions, how, batch=1)
            seconds[active].append(time.perf_counter() - begin)
    rates = {active: results[active].answer_tokens / min(seconds[active][1:]) for active in ACTIVE}
    for active, result in results.items():
        print(
            f"{active} active: {rates[active]:.0f} tokens/s, {rates[active] / rates[1]:.2f} times; "
            f"{result.tokens_per_forward:.2f} tokens per forward; {100 * result.score:.1f}% right"
        )


if __name__ == "__main__":
    checkpoint, *more = sys.argv[1:]
    threshold, count, rounds = more + ["0.95", "50", "5"][len(more) :]
    main(checkpoint, float(threshold), int(count), int(rounds))
