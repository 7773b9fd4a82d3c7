"""Chats in a format that the model has never been taught: sums, answered as "The answer is 12."

    python experiments/smollm2_sft/chats.py FOLDER
    python experiments/smollm2_sft/chats.py --report ANSWERS.jsonl

The first writes FOLDER/chats.jsonl to train on and FOLDER/questions.jsonl, other sums, to be asked: reasoning-gym's
chain_sum with two terms of one digit. The second counts the answers in the format, and the right ones.
"""

import re
import sys
from pathlib import Path

import reasoning_gym

from llada_jax.data.jsonl import read_values, write_values


def sums(seed: int, size: int):
    data = reasoning_gym.create_dataset("chain_sum", seed=seed, size=size, max_terms=2, min_digits=1, max_digits=1)
    for entry in (data[index] for index in range(size)):
        yield {"role": "user", "content": entry["question"]}, f"The answer is {entry['answer']}."


def main(folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    chats = [{"messages": [user, {"role": "assistant", "content": answer}]} for user, answer in sums(0, 2000)]
    questions = [{"messages": [user], "solution": answer} for user, answer in sums(10**9, 40)]
    for name, rows in (("chats", chats), ("questions", questions)):
        write_values(out / f"{name}.jsonl", rows)
    print(f"{out}: {len(chats)} chats, {len(questions)} questions")


def report(answers: str) -> None:
    rows = [row for _, row in read_values(answers)]
    formatted = [row for row in rows if re.fullmatch(r"The answer is -?\d+\.", row["answer"].strip())]
    right = [row for row in rows if row["answer"].strip() == row["solution"]]
    for row in rows[:4]:
        print(f"  {row['messages'][-1]['content']}  ->  {row['answer']!r}")
    tokens, passes = (sum(row[name] for row in rows) for name in ("tokens", "forward_passes"))
    print(
        f"{len(rows)} answers: {len(formatted)} in the format, {len(right)} right, {tokens / passes:.2f} tokens a pass"
    )


if __name__ == "__main__":
    if sys.argv[1] == "--report":
        report(sys.argv[2])
    else:
        main(sys.argv[1])
