"""Rows of columnar files: parquet, and Arrow IPC streams as Hugging Face's `datasets` saves them."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from llada_jax.errors import InputError

FORMATS = ("parquet", "arrow")
_BATCH = 256
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def iter_rows(
    path: str, file_format: str, columns: Sequence[str], offset: int, stop: float = math.inf
) -> Iterator[tuple[int, dict]]:
    """Yields (row number, {column: value}) of the rows in [offset, stop), with those of `columns` that the file has.

    Holds a few hundred rows at a time. Raises InputError naming a file that cannot be read or has none of the columns.
    """
    with _errors_of(path, file_format):
        for row, batch in _BATCHES[file_format](path, columns, offset, stop):
            last = int(min(len(batch), stop - row))
            for start in range(max(0, offset - row), last, _BATCH):
                yield from enumerate(batch.slice(start, min(_BATCH, last - start)).to_pylist(), row + start)


@functools.lru_cache(maxsize=8)
def count_rows(path: str, file_format: str) -> int:
    """Number of rows, without reading their values. Raises InputError as iter_rows."""
    return sum(row_groups(path, file_format))


def row_groups(path: str, file_format: str) -> list[int]:
    """The number of rows of each group or batch, in order, without reading values. Raises InputError as iter_rows."""
    with _errors_of(path, file_format):
        if file_format == "parquet":
            metadata = pq.read_metadata(path)
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        with pa.memory_map(path) as stream, pa.ipc.open_stream(stream) as batches:
            return [len(batch) for batch in batches]


@contextlib.contextmanager
def _errors_of(path: str, file_format: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a text is not UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unknown error"])[0]
        raise InputError(f"{path}: unreadable {file_format} file ({reason})") from error


def _present(path: str, schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    present = [name for name in columns if name in schema.names]
    if not present:
        expected = " or ".join(columns[:6]) + (" or ..." if len(columns) > 6 else "")
        existing = f"; it has {', '.join(schema.names[:20])}" if columns[1:] else ""
        raise InputError(f"{path}: no column {expected}{existing}")
    return present


def _parquet_batches(
    path: str, columns: Sequence[str], offset: int, stop: float
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (number of the first row, batch); row groups outside of [offset, stop) are not read."""
    with pq.ParquetFile(path) as table:
        present, row = _present(path, table.schema_arrow, columns), 0
        for group in range(table.num_row_groups):
            if row >= stop:
                return
            if row + table.metadata.row_group(group).num_rows <= offset:
                row += table.metadata.row_group(group).num_rows
                continue
            for batch in table.iter_batches(_BATCH, row_groups=[group], columns=present):
                yield row, batch
                row += len(batch)


def _arrow_batches(path: str, columns: Sequence[str], offset: int, stop: float) -> Iterator[tuple[int, pa.RecordBatch]]:
    """As _parquet_batches. The file is memory-mapped, so that a skipped batch costs only its header."""
    del offset
    with pa.memory_map(path) as stream:
        stream.seek(max(0, stream.size() - len(_END_OF_STREAM)))
        if stream.read() != _END_OF_STREAM:  # without it a file that was cut between two batches would look whole
            raise pa.ArrowInvalid("no end-of-stream mark, so it is truncated")
    with pa.memory_map(path) as stream, pa.ipc.open_stream(stream) as batches:
        present, row = _present(path, batches.schema, columns), 0
        for batch in batches:
            if row >= stop:
                return
            yield row, batch.select(present)
            row += len(batch)


_BATCHES = {"parquet": _parquet_batches, "arrow": _arrow_batches}
