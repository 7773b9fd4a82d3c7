"""Packs documents or conversations (.txt, .jsonl, .parquet) into rows of tokens for training.

Examples:
  python tools/pack_data.py --source=corpus --tokenizer=checkpoint --out=packed --length=4096
  python tools/pack_data.py --kind=chat --source=chats.jsonl --tokenizer=checkpoint --out=packed --length=4096

A conversation is a .jsonl or .parquet row with `messages` (and `tools`), with `prompt` and `response`, or with
`input_ids` and `prompt_length`. A run that was interrupted goes on where it stopped when it is started again with the
same flags.
"""

import sys
import time

from absl import flags

from llada_jax import errors
from llada_jax.data import pack, pack_chat
from llada_jax.interop import tokenizer

_SOURCE = flags.DEFINE_string("source", None, "Folder (searched recursively) or file of documents.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder with tokenizer.json, or a checkpoint.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the packed dataset.", required=True)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens in a row.", lower_bound=1, required=True)
_KIND = flags.DEFINE_enum("kind", "text", ["text", "chat"], "Documents, or conversations with supervised turns.")
_FIELD = flags.DEFINE_string("field", "text", "Text: JSON key or parquet column that holds the text.")
_PATTERNS = flags.DEFINE_list("patterns", [], 'Text: more files to read as plain text, e.g. "*.py,*.rst".')
_TURNS = flags.DEFINE_enum("turns", "all", ["all", "last"], "Chat: the assistant's turns that are supervised.")
_TAIL = flags.DEFINE_string(
    "tail",
    "all",
    "Chat: end-of-sequence tokens fill a conversation up to --block_align; all of them, the first N (a number) or "
    "none are supervised. With none they are padding.",
)
_SKIP_MALFORMED = flags.DEFINE_bool("skip_malformed", False, "Chat: count malformed rows instead of stopping.")
_BLOCK_ALIGN = flags.DEFINE_integer(
    "block_align", None, "Start documents at multiples of this in a row (default: 1 for text, 32 for chat).", 1
)
_ROWS_PER_SHARD = flags.DEFINE_integer("rows_per_shard", 65536, "Rows in a shard file.", lower_bound=1)
_ONLY = {"text": (_FIELD, _PATTERNS), "chat": (_TURNS, _TAIL, _SKIP_MALFORMED)}


def main(argv):
    del argv
    for kind, kind_flags in _ONLY.items():
        for flag in kind_flags:
            if flag.present and kind != _KIND.value:
                raise errors.InputError(f"--{flag.name} is for --kind={kind}")
    begun = time.monotonic()
    dataset = _pack_chat() if _KIND.value == "chat" else _pack_text()
    summary = (
        f"{dataset['rows']} rows, {dataset['tokens']} tokens, {dataset['documents']} documents, "
        f"{len(dataset['shards'])} shards, {time.monotonic() - begun:.1f} s"
    )
    if _KIND.value == "chat":
        unusable = ", ".join(f"{count} {reason}" for reason, count in dataset["unusable"].items())
        summary += f", {dataset['supervised_tokens']} supervised tokens, {dataset['used']} of "
        summary += f"{dataset['conversations']} conversations used (unusable: {unusable})"
    print(summary)


def _pack_text() -> dict:
    return pack.pack(
        _SOURCE.value,
        tokenizer.load_tokenizer(_TOKENIZER.value),
        _OUT.value,
        _LENGTH.value,
        field=_FIELD.value,
        patterns=_PATTERNS.value,
        block_align=_BLOCK_ALIGN.value or 1,
        rows_per_shard=_ROWS_PER_SHARD.value,
        log=sys.stderr,
    )


def _pack_chat() -> dict:
    return pack_chat.pack_chat(
        _SOURCE.value,
        tokenizer.load_tokenizer(_TOKENIZER.value),
        _OUT.value,
        _LENGTH.value,
        turns=_TURNS.value,
        tail=int(_TAIL.value) if _TAIL.value.isdecimal() else _TAIL.value,
        block_align=_BLOCK_ALIGN.value or 32,
        rows_per_shard=_ROWS_PER_SHARD.value,
        skip_malformed=_SKIP_MALFORMED.value,
        log=sys.stderr,
    )


if __name__ == "__main__":
    errors.run(main)
