"""Packs conversations for SFT: one document each, or one for each of the assistant's turns."""

import functools

from llada_jax.data import chat
from llada_jax.data.pack_examples import Kind, pack_examples
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer


def pack_chat(source: str, tokenizer: Tokenizer, out: str, length: int, *, turns: str = "all", **options) -> dict:
    """Packs the conversations under `source`, rows as in data/chat.py; `turns` is that of chat.prepare.

    `options`, what is returned (`conversations` is the number read; with turns "each" every document counts as one)
    and what is raised are those of pack_examples. A conversation that says nothing is unusable: "no response".
    """
    if turns not in chat.TURNS:
        raise InputError(f"turns {turns!r} is none of {', '.join(chat.TURNS)}")
    prepare = functools.partial(_prepare, tokenizer, turns)
    kind = Kind("chat", "conversations", chat.COLUMNS, ("no response",), {"turns": turns}, prepare)
    return pack_examples(source, tokenizer, out, length, kind, **options)


def _prepare(tokenizer: Tokenizer, turns: str, row: dict) -> list[list[chat.Rendered | chat.Conversation]] | str:
    return [[document] for document in chat.prepare(row, tokenizer, turns)] or "no response"
