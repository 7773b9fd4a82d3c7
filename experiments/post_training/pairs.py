"""Preference pairs from a model's own mistakes: the right answer against the wrong one that it drew.

    python experiments/post_training/pairs.py DRAWN.jsonl PAIRS.jsonl

A line of DRAWN has the `messages` of a question, its `solution`, and the `answer` that tools/generate.py drew.
"""

import json
import sys
from pathlib import Path

from task import write_rows


def pairs(rows):
    """{"prompt", "chosen", "rejected"} of each row whose drawn answer is wrong."""
    for row in rows:
        answer = row["answer"].strip()
        if answer and answer != row["solution"]:
            yield {"prompt": row["messages"], "chosen": row["solution"], "rejected": answer}


def main(drawn: str, out: str) -> None:
    rows = [json.loads(line) for line in Path(drawn).read_text().splitlines()]
    found = list(pairs(rows))
    write_rows(Path(out), found)
    print(f"{out}: {len(found)} wrong answers of {len(rows)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
