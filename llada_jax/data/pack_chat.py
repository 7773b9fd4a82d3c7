"""Packs conversations for SFT: one document per conversation, or one per assistant turn."""

import functools

from llada_jax.data import chat
from llada_jax.data.pack_examples import ExampleKind, pack_examples
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer


def pack_chat(source: str, tokenizer: Tokenizer, out: str, length: int, *, turns: str = "all", **options) -> dict:
    """Packs the conversations under `source` into rows of `length` tokens; data/chat.py describes the input rows.

    turns: "all", "last" or "each", as in chat.prepare. options, the result and the errors: as in pack_examples. The
    result's `conversations` is the number read; with turns "each", every document counts. A conversation without an
    answer is unusable: "no response".
    """
    if turns not in chat.TURNS:
        raise InputError(f"turns {turns!r} is none of {', '.join(chat.TURNS)}")
    prepare = functools.partial(_prepare, tokenizer, turns)
    kind = ExampleKind("chat", "conversations", chat.COLUMNS, ("no response",), {"turns": turns}, prepare)
    return pack_examples(source, tokenizer, out, length, kind, **options)


def _prepare(tokenizer: Tokenizer, turns: str, row: dict) -> list[list[chat.Rendered | chat.Conversation]] | str:
    return [[document] for document in chat.prepare(row, tokenizer, turns)] or "no response"
