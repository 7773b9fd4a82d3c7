"""Packs documents into rows of a fixed number of tokens, stored as ArrayRecord shards.

A packed dataset is a folder of shards `rows-00000.array_record` … and a `dataset.json`, which is written last: a folder
without it is incomplete. `progress.json` records how far an interrupted run came; the next run resumes there and ends
with the same bytes.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llada_jax.data import sources, text
from llada_jax.data.parts import read_parts
from llada_jax.data.progress import progress_lines
from llada_jax.data.rows import FORMAT, encode_row, read_json
from llada_jax.data.sources import Position
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

_NOT_ALWAYS_KEPT = ("source_digest", "tokenizer_identity")  # in dataset.json: older ones have none
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20


class PackedRow(NamedTuple):
    """A finished row and the position after it: `taken` tokens of the document at `source` are already in rows.

    counts: what this row adds to the totals in dataset.json.
    """

    record: bytes
    counts: dict
    source: tuple[int, int]
    taken: int


def pack(
    source: str,
    tokenizer: Tokenizer,
    out: str,
    length: int,
    *,
    field: str = "text",
    patterns: Sequence[str] = (),
    split: str = "",
    block_align: int = 1,
    rows_per_shard: int = 65536,
    processes: int = 1,
    log: TextIO | None = None,
) -> dict:
    """Tokenises the documents of `source` (sources.list_files) and packs them greedily into rows of `length` tokens.

    A document begins as the tokenizer begins documents (Tokenizer.add_bos; a beginning of sequence is not supervised)
    and ends with the tokenizer's end of sequence, if there is one. Documents without tokens are left out. A document
    that crosses the end of a row is split; the rest is a document of the next row, without a beginning of sequence. No
    token is dropped: the last row is padded.

    field: the key or column of the text. patterns, split: as in sources.list_files. block_align: every document starts
    at a multiple of it within its row, with padding before it. processes: that many read and tokenise, and this one
    packs; the bytes written are the same for any number, interrupted or not. log: where progress lines go.

    Returns the contents of dataset.json. A complete dataset with the same settings is left unchanged; an interrupted
    one is continued. Raises InputError on bad input, or if `out` was started with other settings.
    """
    check_shape(length, block_align, rows_per_shard)
    files = sources.list_files(source, patterns=patterns, split=split)
    settings = {
        "format": FORMAT,
        "length": length,
        "block_align": block_align,
        "rows_per_shard": rows_per_shard,
        "field": field,
        "patterns": list(patterns),
        "tokenizer_digest": tokenizer.digest,
        "tokenizer_identity": tokenizer.identity(chat=False),
        "eos_id": tokenizer.eos_id,
        "add_bos": tokenizer.adds_bos,
        "source_files": [[file.name, file.bytes] for file in files],
        "source_digest": sources.content_digest(files),
    }

    def rows_after(source: tuple[int, int], taken: int) -> Iterator[PackedRow]:
        read = functools.partial(_read, files, field, tokenizer)
        tokenised = read_parts(read, files, source, processes)
        given = len(tokenizer.document_prefix)
        return _pack_rows(tokenised, length, block_align, tokenizer.eos_id or 0, taken, given)

    empty = f"{source}: empty dataset, every document is empty"
    return write_dataset(out, settings, files, {"tokens": 0, "documents": 0}, rows_after, empty, log)


def check_shape(length: int, block_align: int, rows_per_shard: int) -> None:
    """Raises InputError naming the value if rows of this shape cannot be packed."""
    if length < 1 or rows_per_shard < 1:
        raise InputError(f"length {length} and rows_per_shard {rows_per_shard} must be at least 1")
    if block_align < 1 or length % block_align:
        raise InputError(f"block_align {block_align} must be at least 1 and divide length {length}")


def write_dataset(
    out: str,
    settings: dict,
    files: Sequence[sources.SourceFile],
    counts: dict,
    rows_after: Callable[[tuple[int, int], int], Iterator[PackedRow]],
    empty: str,
    log: TextIO | None,
) -> dict:
    """Writes shards of settings["rows_per_shard"] rows under `out`, then dataset.json; returns its contents.

    rows_after(source, taken): the rows that follow a row with this `source` and `taken`; (0, 0), 0 is the beginning.
    After a complete shard they must equal those of an uninterrupted run. counts: the totals before any row: numbers,
    "tokens" and "documents" among them, or dicts of numbers. Raises InputError(empty) if there are no rows, and as
    `pack`.
    """
    dataset_path, progress_path = os.path.join(out, "dataset.json"), os.path.join(out, "progress.json")
    if (dataset := read_json(dataset_path)) is not None:
        _check_settings(dataset_path, dataset, settings)
        if log is not None:
            print(f"{out}: already complete", file=log)
        return dataset
    state = _resume(progress_path, settings, counts)
    with _folder(out), progress_lines(files, tuple(state["source"]), state["tokens"], log) as report:
        with contextlib.closing(rows_after(tuple(state["source"]), state["taken"])) as rows:
            state = _write_shards(rows, out, settings, state, report)
        if not state["shards"]:
            raise InputError(empty)
    dataset = settings | {
        "rows": sum(rows for _, rows in state["shards"]),
        **{name: state[name] for name in (*counts, "shards", "digest")},
    }
    _write_json(dataset_path, dataset)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(progress_path)
    return dataset


def _resume(path: str, settings: dict, counts: dict) -> dict:
    """The state in progress.json, or the state before anything is packed."""
    state = {"source": [0, 0], "taken": 0, "shards": [], **counts, "digest": ""}
    progress = read_json(path)
    if progress is None:
        return state
    _check_settings(path, progress, settings)
    return {name: progress[name] for name in state}


def _write_shards(rows: Iterator[PackedRow], out: str, settings: dict, state: dict, report: Callable) -> dict:
    """Writes every shard that follows `state`, recording progress after each; returns the final state."""
    # islice takes no row beyond its shard, so that a full shard is kept even if the next document cannot be read.
    while first := next(rows, None):
        name = f"rows-{len(state['shards']):05d}.array_record"
        unfinished = os.path.join(out, name + ".tmp")
        # Grain reads rows one by one, so every record is a chunk of its own.
        writer = ArrayRecordWriter(unfinished, "group_size:1")
        count = 0
        try:
            for row in itertools.chain([first], itertools.islice(rows, settings["rows_per_shard"] - 1)):
                writer.write(row.record)
                count += 1
                state = _advance(state, row)
                report(row.source, state["documents"], state["tokens"])
        except BaseException:
            writer.close()
            os.unlink(unfinished)
            raise
        writer.close()
        _publish(unfinished, os.path.join(out, name))
        state = state | {"shards": [*state["shards"], [name, count]]}
        _write_json(os.path.join(out, "progress.json"), settings | state)
    return state


def _advance(state: dict, row: PackedRow) -> dict:
    """The state after one more row. The digest is a chain over records: a hash object would not survive a restart."""
    digest = hashlib.sha256(bytes.fromhex(state["digest"]) + row.record).hexdigest()
    return _add(state, row.counts) | {"source": list(row.source), "taken": row.taken, "digest": digest}


def _add(totals: dict, counts: dict) -> dict:
    return totals | {
        name: _add(totals[name], value) if isinstance(value, dict) else totals[name] + value
        for name, value in counts.items()
    }


def _read(
    files: Sequence[sources.SourceFile], field: str, tokenizer: Tokenizer, start: Position, stop: Position
) -> Iterator[tuple[Position, np.ndarray]]:
    """Yields (source, ids [n] int32) of the documents from `start` to `stop`, with beginning and end of sequence."""
    documents = text.iter_documents(files, field, start, stop)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for batch in batches(documents, lambda document: len(document[2])):
        for (file, offset, _), ids in zip(batch, tokenizer.encode_batch([body for *_, body in batch]), strict=True):
            yield (file, offset), np.asarray(tokenizer.begun(ids) + end if ids else [], np.int32)


def batches(items: Iterable, characters: Callable[..., int]) -> Iterator[list]:
    """Yields the items in lists large enough for one call of the tokenizer, which encodes a list on all cores."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if len(batch) == _BATCH_DOCUMENTS or total >= _BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _pack_rows(
    documents: Iterable[tuple[Position, np.ndarray]], length: int, align: int, pad_id: int, skip: int, given: int
) -> Iterator[PackedRow]:
    """Yields full rows, then the padded rest.

    skip: tokens of the first document to leave out. given: tokens at the start of a document that are not supervised.
    """
    pieces: list[tuple[int, np.ndarray, tuple[int, int], bool]] = []  # (start, ids, source, begins a document)
    start, source, taken = 0, (0, 0), 0

    def finish() -> PackedRow:
        ids = np.full(length, pad_id, np.int32)
        for begin, part, _, _ in pieces:
            ids[begin : begin + len(part)] = part
        lengths = [len(part) for _, part, _, _ in pieces]
        spans = [(begin + given * first, begin + len(part)) for begin, part, _, first in pieces] if given else []
        spans = [span for span in spans if span[0] < span[1]] or spans[:1]
        record = encode_row(ids, [piece[0] for piece in pieces], lengths, [piece[2] for piece in pieces], spans)
        counts = {"tokens": sum(lengths), "documents": sum(piece[3] for piece in pieces)}
        return PackedRow(record, counts, source, taken)

    for source, ids in documents:
        taken, skip = skip, 0
        while taken < len(ids):
            part = ids[taken : taken + length - start]
            pieces.append((start, part, source, taken == 0))
            taken += len(part)
            start += len(part) + -len(part) % align  # `start` and `length` are multiples of `align`
            if start == length:
                yield finish()
                pieces, start = [], 0
    if pieces:
        yield finish()


def _check_settings(path: str, stored: dict, settings: dict) -> None:
    """Raises InputError naming the first setting that differs from the stored one."""
    stored = {"add_bos": False} | stored  # datasets older than the setting have none
    same_tokenizer = _same_tokenizer(stored, settings)
    for name, current in settings.items():
        recorded = stored.get(name)
        if recorded == current or (name not in stored and name in _NOT_ALWAYS_KEPT):
            continue
        if name in ("tokenizer_digest", "tokenizer_identity") and same_tokenizer:
            continue
        if name == "source_files" and isinstance(recorded, list):
            differing = sorted({tuple(file) for file in recorded} ^ {tuple(file) for file in current})
            raise InputError(f"{path}: source_files differ, first at {differing[0][0]}; take another output folder")
        if name == "source_digest":
            raise InputError(f"{path}: the contents of the source files have changed; take another output folder")
        raise InputError(f"{path}: {name} is {recorded!r} there but {current!r} now; take another output folder")


def _same_tokenizer(stored: dict, settings: dict) -> bool:
    names = ("tokenizer_digest", "tokenizer_identity")
    return any(stored.get(name) == settings.get(name) is not None for name in names)


@contextlib.contextmanager
def _folder(path: str) -> Iterator[None]:
    """Creates the folder; if the block fails and it is empty, all folders created here are removed again."""
    made = []
    missing = os.path.abspath(path)
    while not os.path.exists(missing):
        made.append(missing)
        missing = os.path.dirname(missing)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                os.rmdir(folder)
        raise


def _write_json(path: str, value: dict) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
    _publish(path + ".tmp", path)


def _publish(unfinished: str, path: str) -> None:
    """Renames a finished file after its bytes are on the disk."""
    with open(unfinished, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(unfinished, path)
