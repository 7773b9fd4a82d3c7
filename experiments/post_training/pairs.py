"""Preference pairs from a model's own mistakes: the right answer against the wrong one that it drew.

    python experiments/post_training/pairs.py DRAWN.jsonl PAIRS.jsonl

Each line of DRAWN has the `messages` of a question, its `solution`, and the `answer` that tools/generate.py drew.
"""

import sys

from llada_jax.data.jsonl import read_values, write_values


def pairs(rows):
    """{"prompt", "chosen", "rejected"} of each row whose drawn answer is wrong."""
    for row in rows:
        answer = row["answer"].strip()
        if answer and answer != row["solution"]:
            yield {"prompt": row["messages"], "chosen": row["solution"], "rejected": answer}


def main(drawn: str, out: str) -> None:
    rows = [row for _, row in read_values(drawn)]
    preferences = list(pairs(rows))
    write_values(out, preferences)
    print(f"{out}: {len(preferences)} wrong answers of {len(rows)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
