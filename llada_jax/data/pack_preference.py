"""Packs preference pairs for DPO: two neighbouring documents, the chosen answer and then the rejected one.

So segments 1 and 2 of a row are its first pair, 3 and 4 the second, as diffusion/preference.py reads them.
"""

import functools

from llada_jax.data import chat, pairs
from llada_jax.data.pack_examples import Kind, pack_examples
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer


def pack_preference(
    source: str, tokenizer: Tokenizer, out: str, length: int, *, max_pairs: int = 16, **options
) -> dict:
    """Packs the pairs under `source`, rows as in data/pairs.py, at most `max_pairs` in a row of `length` tokens.

    `options`, what is returned (`pairs` is the number read) and what is raised are those of pack_examples. Unusable are
    pairs of "identical answers" and those of which an answer says nothing: "no response".
    """
    if max_pairs < 1:
        raise InputError(f"max_pairs {max_pairs} must be at least 1")
    prepare, reasons = functools.partial(_prepare, tokenizer), ("no response", "identical answers")
    kind = Kind("preference", "pairs", pairs.COLUMNS, reasons, {"max_pairs": max_pairs}, prepare, max_pairs)
    return pack_examples(source, tokenizer, out, length, kind, **options)


def _prepare(tokenizer: Tokenizer, row: dict) -> list[list[chat.Rendered | chat.Conversation]] | str:
    documents = pairs.prepare(row, tokenizer)
    return documents if isinstance(documents, str) else [documents]
