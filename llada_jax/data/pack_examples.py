"""Packs examples, whole, into rows of a fixed number of tokens: the dataset that pack.py writes, with spans.

An example is one document (a conversation) or several that must be neighbours in a row (a preference pair).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

import numpy as np

from llada_jax.data import chat
from llada_jax.data.pack import PackedRow, batches, check_shape, write_dataset
from llada_jax.data.parts import read_parts
from llada_jax.data.records import parse_row, read_rows
from llada_jax.data.rows import FORMAT, encode_row
from llada_jax.data.sources import ROW_SUFFIXES, Position, SourceFile, content_digest, list_files, place
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

_OPEN_ROWS = 16


class ExampleKind(NamedTuple):
    """How the rows of a source become examples.

    prepare: maps a parsed row to its examples, each a list of documents for chat.tokenise, or to the reason why it
    cannot be used, one of `reasons`. It raises InputError if the row is malformed, and must be picklable. unit: the
    name of an example in dataset.json, where `settings` are recorded. columns: those read from a table. max_examples:
    the most per packed row (None: any number).
    """

    name: str
    unit: str
    columns: Sequence[str]
    reasons: Sequence[str]
    settings: dict
    prepare: Callable[[dict], list[list[chat.Rendered | chat.Conversation]] | str]
    max_examples: int | None = None


def pack_examples(
    source: str,
    tokenizer: Tokenizer,
    out: str,
    length: int,
    kind: ExampleKind,
    *,
    split: str = "",
    tail: str | int = "all",
    block_align: int = 32,
    rows_per_shard: int = 65536,
    skip_malformed: bool = False,
    processes: int = 1,
    log: TextIO | None = None,
) -> dict:
    """Tokenises the examples under `source` (sources.list_files) and packs them into rows of `length` tokens.

    An example is never split. Each of its documents ends with a supervised end of sequence (Tokenizer.eos_ids): if the
    last turn has none, the tokenizer's is added, in a new block if necessary. (It is not added to `input_ids` that fill
    a whole row, which were probably cut at that length.)

    block_align: a document begins at a multiple of it and is filled up to one with ends of sequence. tail: whether
    these are supervised. "all": all of them; a number: the first `tail` of them, while the rest belong to the document
    and are masked with it, but not scored (diffusion/objectives.py); "none": they are padding. processes: as in `pack`.

    Examples go in order to the first of at most 16 open rows with enough room; a new row closes the fullest one. Every
    shard is packed independently, so that a resumed run needs no memory of open rows.

    Returns the contents of dataset.json: as `pack`, plus `kind`, kind.unit (the number of examples read), `used`,
    `unusable` {reason: number} and `supervised_tokens`. Unusable are examples with a reason of `kind`, those "too long"
    for a row and, with `skip_malformed`, "malformed" rows. Without it, a malformed row raises InputError naming file
    and line. Other errors are those of `pack`.
    """
    check_shape(length, block_align, rows_per_shard)
    if tail not in ("all", "none") and (type(tail) is not int or tail < 0):
        raise InputError(f'tail {tail!r} must be "all", "none" or a number of tokens')
    if tokenizer.eos_id is None:
        raise InputError("the tokenizer has no end-of-sequence token (eos_token in tokenizer_config.json)")
    files = list_files(source, ROW_SUFFIXES, split=split)
    dated = {"template_date": tokenizer.template_date.isoformat()} if tokenizer.asks_for_the_date else {}
    settings = {
        "format": FORMAT,
        "kind": kind.name,
        "length": length,
        "block_align": block_align,
        "rows_per_shard": rows_per_shard,
        **kind.settings,
        **dated,
        "tail": tail,
        "skip_malformed": skip_malformed,
        "tokenizer_digest": tokenizer.digest,
        "tokenizer_identity": tokenizer.identity(chat=True),
        "eos_id": tokenizer.eos_id,
        "add_bos": tokenizer.adds_bos,
        "source_files": [[file.name, file.bytes] for file in files],
        "source_digest": content_digest(files),
    }
    counts = {"tokens": 0, "documents": 0, "used": 0, **_nothing_read(kind), "supervised_tokens": 0}

    def rows_after(position: tuple[int, int], taken: int) -> Iterator[PackedRow]:
        read = functools.partial(_read, files, tokenizer, kind, skip_malformed)
        examples = itertools.islice(read_parts(read, files, position, processes), taken, None)
        fitted = ((origin, _fit(item, length, block_align, tail, tokenizer.eos_ids)) for origin, item in examples)
        end = _Place((len(files), 0), 0)
        return _pack_rows(fitted, length, rows_per_shard, tokenizer.eos_id, end, kind, source)

    return write_dataset(out, settings, files, counts, rows_after, f"{source}: empty dataset, no {kind.unit}", log)


def _nothing_read(kind: ExampleKind) -> dict:
    return {kind.unit: 0, "unusable": dict.fromkeys((*kind.reasons, "too long", "malformed"), 0)}


class _Place(NamedTuple):
    """The example with number `index` of the row at `source`, (file index, offset)."""

    source: tuple[int, int]
    index: int


class _Piece(NamedTuple):
    """A document with its tail: ids [size], of which the first `length` belong to it, and its supervised spans."""

    ids: np.ndarray
    length: int
    spans: list[tuple[int, int]]


@dataclasses.dataclass(eq=False)
class _OpenRow:
    """A row being filled: `used` tokens are taken by its (source, piece) pairs."""

    pieces: list[tuple[tuple[int, int], _Piece]] = dataclasses.field(default_factory=list)
    used: int = 0
    examples: int = 0

    def add(self, source: tuple[int, int], example: Sequence[_Piece]) -> None:
        self.pieces += [(source, piece) for piece in example]
        self.used += _size(example)
        self.examples += 1


def _size(example: Sequence[_Piece]) -> int:
    return sum(len(piece.ids) for piece in example)


def _read(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    kind: ExampleKind,
    skip_malformed: bool,
    start: Position,
    stop: Position,
) -> Iterator[tuple[_Place, list[chat.Conversation] | str]]:
    """Yields (place, the example's documents or the reason why it is unusable) for the rows in [start, stop)."""

    def prepare():
        for file, offset, row in read_rows(files, kind.columns, start, stop):
            try:
                examples = kind.prepare(parse_row(row))
            except InputError as error:
                # What the template does to every row is not the row's fault: skipping would skip them all.
                if not skip_malformed or isinstance(error, chat.TemplateError):
                    raise type(error)(f"{place(files[file], offset)}: {error}") from error
                examples = "malformed"
            examples = [examples] if isinstance(examples, str) else examples
            yield from ((_Place((file, offset), index), example) for index, example in enumerate(examples))

    def characters(entry) -> int:
        return sum(len(item.text) for item in entry[1] if isinstance(item, chat.Rendered))

    for batch in batches(prepare(), characters):
        prepared = [item for _, example in batch if not isinstance(example, str) for item in example]
        tokenised = iter(chat.tokenise(prepared, tokenizer))
        for origin, example in batch:
            if not isinstance(example, str):
                example = list(itertools.islice(tokenised, len(example)))
                example = "no response" if None in example else example
            yield origin, example


def _fit(example: list[chat.Conversation] | str, length: int, align: int, tail: str | int, eos_ids: Sequence[int]):
    """The example's documents with their tails (a list of _Piece), or the reason why it is unusable."""
    if isinstance(example, str):
        return example
    pieces = [_fill(_ended(conversation, length, eos_ids), align, tail, eos_ids[0]) for conversation in example]
    return "too long" if _size(pieces) > length else pieces


def _ended(conversation: chat.Conversation, length: int, eos_ids: Sequence[int]) -> chat.Conversation:
    """The conversation with an end of sequence at its end: the model must learn to stop."""
    ids, (*spans, (first, last)), given = conversation
    if ids[-1] in eos_ids or (given and len(ids) == length):
        return conversation
    return chat.Conversation(np.append(ids, np.int32(eos_ids[0])), [*spans, (first, last + 1)])


def _fill(conversation: chat.Conversation, align: int, tail: str | int, eos_id: int) -> _Piece:
    count = len(conversation.ids)
    size = count + -count % align
    ids = np.append(conversation.ids, np.full(size - count, eos_id, np.int32))
    supervised = min(size, count + {"all": size, "none": 0}.get(tail, tail))
    spans = conversation.spans + ([(count, supervised)] if supervised > count else [])
    return _Piece(ids, count if tail == "none" else size, spans)


def _pack_rows(
    examples: Iterable[tuple[_Place, list[_Piece] | str]],
    length: int,
    rows_per_shard: int,
    pad_id: int,
    end: _Place,
    kind: ExampleKind,
    name: str,
) -> Iterator[PackedRow]:
    """Yields the rows. The last row of a shard has the place where the next shard begins, and counts all before it.

    end: the place after all examples. Raises InputError naming `name` if no example is usable.
    """
    open_rows: list[_OpenRow] = []
    opened = 0
    read = _nothing_read(kind)

    def close(row: _OpenRow, origin: _Place) -> PackedRow:
        nonlocal read
        open_rows.remove(row)
        counts, read = read, _nothing_read(kind)
        return _finish(row, length, pad_id, counts, origin)

    def has_room(row: _OpenRow, example: list[_Piece]) -> bool:
        return row.used + _size(example) <= length and row.examples != kind.max_examples

    for origin, example in examples:
        if isinstance(example, str):
            read["unusable"][example] += 1
        else:
            row = next((row for row in open_rows if has_room(row, example)), None)
            if row is None:
                if opened == rows_per_shard:
                    while open_rows:
                        yield close(open_rows[0], origin)
                    opened = 0
                elif len(open_rows) == _OPEN_ROWS:
                    yield close(max(open_rows, key=lambda row: row.used), origin)
                row = _OpenRow()
                open_rows.append(row)
                opened += 1
            row.add(origin.source, example)
        read[kind.unit] += 1
    if not open_rows and read[kind.unit]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in read["unusable"].items() if count)
        raise InputError(f"{name}: empty dataset, none of {read[kind.unit]} {kind.unit} is usable ({reasons})")
    while open_rows:
        yield close(open_rows[0], end)


def _finish(row: _OpenRow, length: int, pad_id: int, counts: dict, origin: _Place) -> PackedRow:
    """The row as a record, with its counts and those of the examples read."""
    ids = np.full(length, pad_id, np.int32)
    starts, spans, start = [], [], 0
    for _, piece in row.pieces:
        ids[start : start + len(piece.ids)] = piece.ids
        starts.append(start)
        spans += [(start + first, start + last) for first, last in piece.spans]
        start += len(piece.ids)
    lengths = [piece.length for _, piece in row.pieces]
    record = encode_row(ids, starts, lengths, [source for source, _ in row.pieces], spans)
    counts = counts | {"tokens": sum(lengths), "documents": len(lengths), "used": row.examples}
    supervised = sum(last - first for first, last in spans)
    return PackedRow(record, counts | {"supervised_tokens": supervised}, origin.source, origin.index)
