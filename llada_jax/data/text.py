"""Readers of documents: text files, .jsonl lines and table rows as one stream that can be taken up again anywhere."""

from collections.abc import Iterator, Sequence

from llada_jax.data import tables
from llada_jax.data.records import parse_object, read_lines
from llada_jax.data.sources import Position, SourceFile, place, ranges
from llada_jax.errors import InputError


def iter_documents(
    files: Sequence[SourceFile], field: str = "text", start: Position = (0, 0), stop: Position | None = None
) -> Iterator[tuple[int, int, str]]:
    """Yields (file index, offset, text) for the documents from `start` to `stop`, exclusive, in order.

    The offset is a byte offset in a .jsonl file, a row number in a table and 0 in a text file; passing a yielded
    (file index, offset) as `start` resumes at that document without reading what precedes it. `field` is the JSON key
    or column that holds the text. Raises InputError naming the file and line or row.
    """
    for index, offset, end in ranges(files, start, stop):
        file = files[index]
        if file.format == "text":
            yield index, 0, _read_text(file.path)
            continue
        if file.format == "jsonl":
            rows = read_lines(file.path, offset, end)
        else:
            rows = tables.iter_rows(file.path, file.format, [field], offset, end)
        for position, row in rows:
            try:
                text = _text(parse_object(row) if isinstance(row, bytes) else row, field)
            except InputError as error:
                raise InputError(f"{place(file, position)}: {error}") from error
            yield index, position, text


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8") from error


def _text(record: dict, field: str) -> str:
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
