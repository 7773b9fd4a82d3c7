"""Readers of rows with several fields: JSON values and table rows as one stream that can start anywhere."""

import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from llada_jax.data import jsonl, tables
from llada_jax.data.sources import Position, SourceFile, ranges, read_text
from llada_jax.errors import InputError


def read_rows(
    files: Sequence[SourceFile], columns: Sequence[str], start: Position = (0, 0), stop: Position | None = None
) -> Iterator[tuple[int, int, bytes | dict]]:
    """Yields (file index, offset, row for `parse_row`) for the rows in [start, stop), in order.

    Offsets are those of sources.Position. From a table only `columns` are read. Raises InputError naming a file that
    cannot be read.
    """
    for index, offset, end in ranges(files, start, stop):
        for position, row in file_rows(files[index], columns, offset, end):
            yield index, position, row


def file_rows(
    file: SourceFile, columns: Sequence[str], offset: int, stop: float = math.inf
) -> Iterator[tuple[int, bytes | dict]]:
    """Yields (offset, row) for the rows of one file that begin in [offset, stop); as read_rows."""
    if file.format == "jsonl":
        return read_lines(file, offset, stop)
    if file.format == "json":
        return _elements(file, offset, stop)
    return tables.iter_rows(file.path, file.format, columns, offset, stop)


def parse_row(row: bytes | dict) -> dict:
    """A row as a dict without nulls: a null counts as an absent key.

    In a table every struct has the keys of all rows, so nulls are removed at every depth. Raises InputError, without
    file and line, if a line is not a JSON object.
    """
    if isinstance(row, bytes):
        return {name: value for name, value in parse_object(row).items() if value is not None}
    return _without_nulls(row)


def parse_object(line: bytes) -> dict:
    """The JSON object on a line. Raises InputError, without file and line, if it is something else."""
    record = jsonl.parse_line(line)
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    return record


def read_lines(file: SourceFile, offset: int, stop: float = math.inf) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, line) of the non-blank lines that begin in [offset, stop), in bytes.

    Raises InputError naming the file.
    """
    with file.open() as stream:
        _skip(stream, offset, bool(file.compression))
        while offset < stop and (line := stream.readline()):
            if line.strip():
                yield offset, line
            offset += len(line)


def _skip(stream: BinaryIO, offset: int, compressed: bool) -> None:
    if not compressed:
        stream.seek(offset)
    while compressed and offset > 0 and (chunk := stream.read(min(offset, 1 << 20))):
        offset -= len(chunk)


def _elements(file: SourceFile, offset: int, stop: float) -> Iterator[tuple[int, bytes]]:
    try:
        for position, text in jsonl.read_elements(read_text(file), offset, stop):
            yield position, text.encode()
    except InputError as error:
        raise error if str(error).startswith(file.path) else InputError(f"{file.path}:{error}") from error


def _without_nulls(value):
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
