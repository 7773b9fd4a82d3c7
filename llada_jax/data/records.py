"""Readers of rows with several fields: .jsonl lines and table rows as one stream that can be taken up anywhere."""

import math
from collections.abc import Iterator, Sequence

from llada_jax.data import jsonl, tables
from llada_jax.data.sources import Position, SourceFile, ranges
from llada_jax.errors import InputError


def read_rows(
    files: Sequence[SourceFile], columns: Sequence[str], start: Position = (0, 0), stop: Position | None = None
) -> Iterator[tuple[int, int, bytes | dict]]:
    """Yields (file index, offset, row for `parse_row`) for the rows from `start` to `stop`, exclusive, in order.

    The offset is a byte offset in a .jsonl file and a row number in a table, of which only `columns` are read. Raises
    InputError naming the file if it cannot be read.
    """
    for index, offset, end in ranges(files, start, stop):
        file = files[index]
        if file.format == "jsonl":
            rows = read_lines(file.path, offset, end)
        else:
            rows = tables.iter_rows(file.path, file.format, columns, offset, end)
        for position, row in rows:
            yield index, position, row


def parse_row(row: bytes | dict) -> dict:
    """A row as a dict without nulls: an absent key and a null are the same.

    A table gives every struct all the keys that any of its rows has, so there nulls are left out at every depth.
    Raises InputError, without the place, if a line is not a JSON object.
    """
    if isinstance(row, bytes):
        return {name: value for name, value in parse_object(row).items() if value is not None}
    return _without_nulls(row)


def parse_object(line: bytes) -> dict:
    """The JSON object on a line. Raises InputError, without the place, when it is something else."""
    record = jsonl.parse_line(line)
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    return record


def read_lines(path: str, offset: int, stop: float = math.inf) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, line) for the lines that begin in [offset, stop), in bytes, and are not blank.

    Raises InputError naming the file.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            while offset < stop and (line := stream.readline()):
                if line.strip():
                    yield offset, line
                offset += len(line)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def _without_nulls(value):
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
