"""Readers of documents: text files, JSON values and table rows as one stream that can resume anywhere."""

from collections.abc import Iterator, Sequence

from llada_jax.data.records import file_rows, parse_object
from llada_jax.data.sources import Position, SourceFile, place, ranges, read_text
from llada_jax.errors import InputError


def iter_documents(
    files: Sequence[SourceFile], field: str = "text", start: Position = (0, 0), stop: Position | None = None
) -> Iterator[tuple[int, int, str]]:
    """Yields (file index, offset, text) of the documents in [start, stop), in order.

    Offsets are those of sources.Position; a yielded (file index, offset), passed as `start`, resumes at that document.
    field: the JSON key or column of the text. Raises InputError naming the file and line or row.
    """
    for index, offset, end in ranges(files, start, stop):
        file = files[index]
        if file.format == "text":
            yield index, 0, read_text(file)
            continue
        for position, row in file_rows(file, [field], offset, end):
            try:
                text = _text(parse_object(row) if isinstance(row, bytes) else row, field)
            except InputError as error:
                raise InputError(f"{place(file, position)}: {error}") from error
            yield index, position, text


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
