"""Documents for the ablations and a tokenizer for them: functions of the Python standard library, one per line.

    python experiments/ablations/functions.py FOLDER  ->  FOLDER/text/functions.jsonl, FOLDER/tokenizer

They are real text that every machine has, and so short that a row of 128 tokens holds two, or parts of two.
"""

import ast
import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from llada_jax.data.jsonl import read_values, write_values

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import stdlib_text  # noqa: E402

EOS, MASK = "<|endoftext|>", "<|mask|>"
SPECIAL_FROM, VOCABULARY = 508, 512  # the preset `tiny` has its end of text at 508 and its mask token at 511, of 512
SHORTEST, LONGEST = 80, 800  # characters


def functions(source: str) -> Iterator[str]:
    """Functions and methods of a module, decorators and docstrings too, without those inside other functions."""
    lines = source.splitlines()

    def outermost(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            else:
                yield from outermost(child)

    for node in outermost(ast.parse(source)):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        yield textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))


def train_tokenizer(texts: Iterator[str], folder: Path) -> None:
    """Byte-level BPE of 508 tokens, the end of text and the mask above them."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=SPECIAL_FROM, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    unused = [f"<|unused_{index}|>" for index in range(SPECIAL_FROM + 1, VOCABULARY - 1)]
    model.add_special_tokens([EOS, *unused, MASK])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    write_values(folder / "tokenizer_config.json", [{"eos_token": EOS, "pad_token": EOS, "mask_token": MASK}])


def main(folder: str) -> None:
    out = Path(folder)
    stdlib_text.main(out / "stdlib")
    modules = [row["text"] for _, row in read_values(out / "stdlib" / "stdlib.jsonl")]
    unique = dict.fromkeys(text for module in modules for text in functions(module))  # each of them once
    texts = [text for text in unique if SHORTEST <= len(text) <= LONGEST]
    random.Random(0).shuffle(texts)  # the last rows are held out: they are to be of all modules
    train_tokenizer(iter(texts), out / "tokenizer")
    (out / "text").mkdir(exist_ok=True)
    write_values(out / "text" / "functions.jsonl", [{"text": text} for text in texts])
    print(f"{len(texts)} functions, {sum(map(len, texts))} characters -> {out / 'text' / 'functions.jsonl'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
