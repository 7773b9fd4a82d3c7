"""Packs preference pairs for DPO: two neighbouring documents, the chosen answer and then the rejected one.

So segments 1 and 2 of a row are its first pair, 3 and 4 the second, as diffusion/preference.py reads them.
"""

import functools

from llada_jax.data import chat, pairs
from llada_jax.data.pack_examples import ExampleKind, pack_examples
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer


def pack_preference(
    source: str, tokenizer: Tokenizer, out: str, length: int, *, max_pairs: int = 16, **options
) -> dict:
    """Packs the preference pairs under `source`; data/pairs.py describes the input rows.

    max_pairs: the most pairs per row of `length` tokens. options, the result and the errors: as in pack_examples; the
    result's `pairs` is the number read. Unusable pairs have "identical answers", or an empty one: "no response".
    """
    if max_pairs < 1:
        raise InputError(f"max_pairs {max_pairs} must be at least 1")
    prepare, reasons = functools.partial(_prepare, tokenizer), ("no response", "identical answers")
    kind = ExampleKind("preference", "pairs", pairs.COLUMNS, reasons, {"max_pairs": max_pairs}, prepare, max_pairs)
    return pack_examples(source, tokenizer, out, length, kind, **options)


def _prepare(tokenizer: Tokenizer, row: dict) -> list[list[chat.Rendered | chat.Conversation]] | str:
    documents = pairs.prepare(row, tokenizer)
    return documents if isinstance(documents, str) else [documents]
