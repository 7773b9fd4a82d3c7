"""The data of the experiment: haystacks of llada_jax/evaluation/needle.py with their answers, and a tokenizer for them.

python experiments/long_context/data.py FOLDER   ->  FOLDER/tokenizer/, short.jsonl, long.jsonl

One fact a text, other texts than those of the test, which have seed 1. A word is a token, and so is a digit.
"""

import sys
from pathlib import Path

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.jsonl import write_values
from llada_jax.evaluation.needle import haystacks
from llada_jax.interop.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "post_training"))

PIECES = r"\d| ?[A-Za-z]+|[^A-Za-z\d ]| "
# {file: (contexts in tokens, texts of each)}
SIZES = {"short": (range(40, 240, 10), 700), "long": (range(100, 1001, 50), 120)}


def main(folder: str) -> None:
    import task  # of experiments/post_training

    out = Path(folder)
    texts = [found.text for found in haystacks(byte_tokenizer(256), 2000, 200, seed=2)]
    task.train_tokenizer(texts, out / "tokenizer", PIECES)
    tokenizer = load_tokenizer(str(out / "tokenizer"))
    for name, (contexts, count) in SIZES.items():
        found = (each for context in contexts for each in haystacks(tokenizer, context, count, seed=1000 + context))
        write_values(out / f"{name}.jsonl", ({"messages": task.messages(each.text, each.number)} for each in found))
        print(f"{out / name}.jsonl: {len(contexts) * count} texts", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
