"""Packs conversations, whole, into rows of a fixed number of tokens: the dataset that pack.py writes, with spans."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

import numpy as np

from llada_jax.data import chat
from llada_jax.data.pack import PackedRow, batches, check_shape, write_dataset
from llada_jax.data.rows import FORMAT, encode_row
from llada_jax.data.text import SourceFile
from llada_jax.errors import InputError
from llada_jax.interop.tokenizer import Tokenizer

REASONS = ("no response", "too long", "malformed")
_OPEN_ROWS = 16


def pack_chat(
    source: str,
    tokenizer: Tokenizer,
    out: str,
    length: int,
    *,
    turns: str = "all",
    tail: str | int = "all",
    block_align: int = 32,
    rows_per_shard: int = 65536,
    skip_malformed: bool = False,
    log: TextIO | None = None,
) -> dict:
    """Tokenises the conversations under `source` (data/chat.py) and packs them into rows of `length` tokens.

    A conversation is never split, and begins at a multiple of `block_align`. It is filled up to one with
    end-of-sequence tokens, and `tail` says what they are: "all" supervised; the first `tail` of them supervised, the
    rest part of the conversation but not supervised; or "none", padding. `turns` is that of chat.prepare.

    Conversations go, in order, to the first of at most 16 open rows that has room; a new row closes the fullest of
    them. Every shard is packed on its own, so that a run continues at a shard without a memory of open rows.

    Returns the contents of dataset.json: as `pack`, and `conversations` (rows read), `used`, `unusable` {reason:
    number} and `supervised_tokens`. Unusable are conversations with "no response", "too long" ones, and "malformed"
    rows with `skip_malformed`; otherwise these raise InputError with file and line. Raises as `pack` besides.
    """
    check_shape(length, block_align, rows_per_shard)
    if tail not in ("all", "none") and (type(tail) is not int or tail < 0):
        raise InputError(f'tail {tail!r} must be "all", "none" or a number of tokens')
    if turns not in ("all", "last"):
        raise InputError(f'turns {turns!r} must be "all" or "last"')
    if tokenizer.eos_id is None:
        raise InputError("the tokenizer has no end-of-sequence token (eos_token in tokenizer_config.json)")
    files = chat.list_files(source)
    settings = {
        "format": FORMAT,
        "kind": "chat",
        "length": length,
        "block_align": block_align,
        "rows_per_shard": rows_per_shard,
        "turns": turns,
        "tail": tail,
        "skip_malformed": skip_malformed,
        "tokenizer_digest": tokenizer.digest,
        "eos_id": tokenizer.eos_id,
        "source_files": [[file.name, file.bytes] for file in files],
    }
    counts = {"tokens": 0, "documents": 0, "conversations": 0, "used": 0, "unusable": dict.fromkeys(REASONS, 0)}
    counts |= {"supervised_tokens": 0}

    def rows_after(position: tuple[int, int], taken: int) -> Iterator[PackedRow]:
        del taken  # a conversation is taken whole
        conversations = _read(files, position, tokenizer, turns, skip_malformed)
        fitted = ((at, _fit(item, length, block_align, tail, tokenizer.eos_id)) for at, item in conversations)
        return _pack_rows(fitted, length, rows_per_shard, tokenizer.eos_id, (len(files), 0), source)

    return write_dataset(out, settings, files, counts, rows_after, f"{source}: empty dataset, no conversation", log)


class _Piece(NamedTuple):
    """A conversation as a row takes it: ids [size], of which `length` belong to it, and its supervised spans."""

    ids: np.ndarray
    length: int
    spans: list[tuple[int, int]]


@dataclasses.dataclass(eq=False)
class _OpenRow:
    """A row that is being filled: `used` tokens of it are taken by (source, piece) pairs."""

    pieces: list[tuple[tuple[int, int], _Piece]] = dataclasses.field(default_factory=list)
    used: int = 0

    def add(self, source: tuple[int, int], piece: _Piece) -> None:
        self.pieces.append((source, piece))
        self.used += len(piece.ids)


def _read(
    files: Sequence[SourceFile], start: tuple[int, int], tokenizer: Tokenizer, turns: str, skip_malformed: bool
) -> Iterator[tuple[tuple[int, int], chat.Conversation | str]]:
    """Yields (source, conversation, or the reason why it cannot be used) for every row of the files."""

    def prepare():
        for file, offset, row in chat.read_rows(files, start):
            try:
                item = chat.prepare(chat.parse_row(row), tokenizer, turns)
            except InputError as error:
                # What the template does to every row is not the row's fault: skipping would skip them all.
                if not skip_malformed or isinstance(error, chat.TemplateError):
                    raise type(error)(f"{chat.place(files[file], offset)}: {error}") from error
                item = "malformed"
            yield (file, offset), item or "no response"

    def size(entry) -> int:
        return len(entry[1].text) if isinstance(entry[1], chat.Rendered) else 0

    for batch in batches(prepare(), size):
        prepared = [item for _, item in batch if not isinstance(item, str)]
        tokenised = iter(chat.tokenise(prepared, tokenizer))
        for source, item in batch:
            yield source, item if isinstance(item, str) else next(tokenised) or "no response"


def _fit(conversation: chat.Conversation | str, length: int, align: int, tail: str | int, eos_id: int) -> _Piece | str:
    """The conversation with its tail, or why it cannot be used."""
    if isinstance(conversation, str):
        return conversation
    count = len(conversation.ids)
    if count > length:
        return "too long"
    size = count + -count % align
    ids = np.append(conversation.ids, np.full(size - count, eos_id, np.int32))
    supervised = min(size, count + {"all": size, "none": 0}.get(tail, tail))
    spans = conversation.spans + ([(count, supervised)] if supervised > count else [])
    return _Piece(ids, count if tail == "none" else size, spans)


def _pack_rows(
    pieces: Iterable[tuple[tuple[int, int], _Piece | str]],
    length: int,
    rows_per_shard: int,
    pad_id: int,
    end: tuple[int, int],
    name: str,
) -> Iterator[PackedRow]:
    """Yields the rows; the last row of a shard says where the next shard begins, with everything before counted.

    `end` is the source that follows all others. Raises InputError naming `name` if no conversation can be used.
    """
    open_rows: list[_OpenRow] = []
    opened = 0
    read = {"conversations": 0, "unusable": dict.fromkeys(REASONS, 0)}

    def close(row: _OpenRow, source: tuple[int, int]) -> PackedRow:
        nonlocal read
        open_rows.remove(row)
        counts, read = read, {"conversations": 0, "unusable": dict.fromkeys(REASONS, 0)}
        return _finish(row, length, pad_id, counts, source)

    for source, piece in pieces:
        if isinstance(piece, str):
            read["unusable"][piece] += 1
        else:
            row = next((row for row in open_rows if row.used + len(piece.ids) <= length), None)
            if row is None:
                if opened == rows_per_shard:
                    while open_rows:
                        yield close(open_rows[0], source)
                    opened = 0
                elif len(open_rows) == _OPEN_ROWS:
                    yield close(max(open_rows, key=lambda row: row.used), source)
                row = _OpenRow()
                open_rows.append(row)
                opened += 1
            row.add(source, piece)
        read["conversations"] += 1
    if not open_rows and read["conversations"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in read["unusable"].items() if count)
        raise InputError(f"{name}: empty dataset, none of {read['conversations']} conversations is usable ({reasons})")
    while open_rows:
        yield close(open_rows[0], end)


def _finish(row: _OpenRow, length: int, pad_id: int, counts: dict, source: tuple[int, int]) -> PackedRow:
    """The row as a record, its counts added to those of the rows read."""
    ids = np.full(length, pad_id, np.int32)
    starts, spans, start = [], [], 0
    for _, piece in row.pieces:
        ids[start : start + len(piece.ids)] = piece.ids
        starts.append(start)
        spans += [(start + first, start + last) for first, last in piece.spans]
        start += len(piece.ids)
    lengths = [piece.length for _, piece in row.pieces]
    record = encode_row(ids, starts, lengths, [where for where, _ in row.pieces], spans)
    counts = counts | {"tokens": sum(lengths), "documents": len(lengths), "used": len(lengths)}
    return PackedRow(record, counts | {"supervised_tokens": sum(last - first for first, last in spans)}, source, 0)
