"""Chats in a format that the model has never been taught: sums, answered as "The answer is 12."

    python experiments/smollm2_sft_chats.py FOLDER

Writes FOLDER/chats.jsonl to train on and FOLDER/questions.jsonl, other sums, to be asked. The sums are reasoning-gym's
chain_sum with two terms of one digit.
"""

import json
import sys
from pathlib import Path

import reasoning_gym


def sums(seed: int, size: int):
    data = reasoning_gym.create_dataset("chain_sum", seed=seed, size=size, max_terms=2, min_digits=1, max_digits=1)
    for entry in (data[index] for index in range(size)):
        yield {"role": "user", "content": entry["question"]}, f"The answer is {entry['answer']}."


def main(folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    chats = [{"messages": [user, {"role": "assistant", "content": answer}]} for user, answer in sums(0, 2000)]
    questions = [{"messages": [user], "answer": answer} for user, answer in sums(10**9, 40)]
    for name, rows in (("chats", chats), ("questions", questions)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {len(chats)} chats, {len(questions)} questions")


if __name__ == "__main__":
    main(sys.argv[1])
