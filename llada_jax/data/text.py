"""Readers of documents: .txt, .jsonl and .parquet files as one stream that can be taken up again anywhere."""

import fnmatch
import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from llada_jax.errors import InputError

_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
_PARQUET_BATCH = 256


@dataclass(frozen=True)
class SourceFile:
    """One input file: `name` is its path relative to the source folder, `format` is text, jsonl or parquet."""

    path: str
    name: str
    bytes: int
    format: str


def list_files(source: str, patterns: Sequence[str] = ()) -> list[SourceFile]:
    """Lists the readable files under `source` (a folder, or one file), sorted by relative path.

    A file whose name matches one of `patterns` (e.g. "*.py") is one plain text document; otherwise the suffix
    decides. Names that begin with a dot are skipped. Raises InputError if nothing readable is found.
    """
    if os.path.isfile(source):
        names = [os.path.basename(source)]
        root = os.path.dirname(source)
    elif os.path.isdir(source):
        names = sorted(_walk(source))
        root = source
    else:
        raise InputError(f"{source}: no such file or folder")
    files = []
    for name in names:
        file_format = _format(name, patterns)
        if file_format is not None:
            path = os.path.join(root, name)
            try:
                files.append(SourceFile(path, name, os.path.getsize(path), file_format))
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}") from error
    if not files:
        readable = ", ".join([f"*{suffix}" for suffix in _FORMATS] + list(patterns))
        raise InputError(f"{source}: empty dataset, no file matches {readable}")
    return files


def iter_documents(
    files: Sequence[SourceFile], field: str = "text", start: tuple[int, int] = (0, 0)
) -> Iterator[tuple[int, int, str]]:
    """Yields (file index, offset, text) for every document, in order, beginning with the document at `start`.

    The offset is a byte offset in a .jsonl file, a row number in a .parquet file and 0 in a text file; passing a
    yielded (file index, offset) as `start` resumes at that document without reading what precedes it. `field` is
    the JSON key or parquet column that holds the text. Raises InputError naming the file and line or row.
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    first_file, first_offset = start
    for index in range(first_file, len(files)):
        file = files[index]
        offset = first_offset if index == first_file else 0
        try:
            for position, text in readers[file.format](file.path, field, offset):
                yield index, position, text
        except OSError as error:
            raise InputError(f"{file.path}: {error.strerror or error}") from error


def bytes_before(files: Sequence[SourceFile], position: tuple[int, int]) -> int:
    """Input bytes that precede the document at (file index, offset); within a parquet file in proportion to rows."""
    index, offset = position
    whole = sum(file.bytes for file in files[:index])
    if index < len(files) and files[index].format == "parquet":
        offset = files[index].bytes * offset // max(1, _parquet_rows(files[index].path))
    return whole + offset


@functools.lru_cache(maxsize=8)
def _parquet_rows(path: str) -> int:
    return pq.read_metadata(path).num_rows


def _walk(folder: str) -> Iterator[str]:
    def stop(error: OSError):
        raise InputError(f"{error.filename}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        for name in names:
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(relative, name))


def _format(name: str, patterns: Sequence[str]) -> str | None:
    base = os.path.basename(name)
    if any(fnmatch.fnmatchcase(base, pattern) for pattern in patterns):
        return "text"
    return _FORMATS.get(os.path.splitext(base)[1])


def _read_text(path: str, field: str, offset: int) -> Iterator[tuple[int, str]]:
    del field, offset
    with open(path, "rb") as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8") from error
    yield 0, text


def _read_jsonl(path: str, field: str, offset: int) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as stream:
        stream.seek(offset)
        while line := stream.readline():
            if line.strip():
                try:
                    text = _json_text(line, field)
                except InputError as error:
                    # Line numbers are counted only now, so that a restart need not read the file's beginning.
                    raise InputError(f"{path}:{line_number(path, offset)}: {error}") from error
                yield offset, text
            offset += len(line)


def parse_object(line: bytes) -> dict:
    """The JSON object on a line. Raises InputError, without the place, when it is something else."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    return record


def _json_text(line: bytes, field: str) -> str:
    record = parse_object(line)
    if field not in record:
        raise InputError(f'field "{field}" is missing')
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f'field "{field}" is not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f'field "{field}" holds a lone surrogate') from error
    return text


def line_number(path: str, offset: int) -> int:
    """Number, from 1, of the line that begins at a byte offset."""
    lines = 1
    with open(path, "rb") as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 20))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def _read_parquet(path: str, field: str, offset: int) -> Iterator[tuple[int, str]]:
    try:
        with pq.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise InputError(f'{path}: column "{field}" is missing')
            row = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row + rows > offset:
                    yield from _read_row_group(table, path, field, group, row, offset)
                row += rows
    except UnicodeDecodeError as error:
        raise InputError(f'{path}: column "{field}" is not UTF-8') from error
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unknown error"])[0]
        raise InputError(f"{path}: unreadable parquet file ({reason})") from error


def _read_row_group(
    table: pq.ParquetFile, path: str, field: str, group: int, row: int, offset: int
) -> Iterator[tuple[int, str]]:
    """Yields (row number, text) of the rows at or after `offset` in one row group whose first row is `row`."""
    for batch in table.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=[field]):
        if row + len(batch) > offset:
            for position, text in enumerate(batch.column(0).to_pylist(), row):
                if position >= offset:
                    if not isinstance(text, str):
                        raise InputError(f'{path}:row {position}: field "{field}" is not a string')
                    yield position, text
        row += len(batch)
