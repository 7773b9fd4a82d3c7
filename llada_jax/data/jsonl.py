"""JSON lines: parses a line, reads a file with the position of each line, writes a file completely or not at all.

Also .json files that hold an array of values, or one value over several lines.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llada_jax.errors import InputError

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def parse_line(line: bytes):
    """The JSON value on a line. Raises InputError, without file and line, if there is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON ({getattr(error, 'msg', error)})") from error


def read_values(path: str | os.PathLike) -> Iterator[tuple[str, object]]:
    """Yields ("path:line", value) for every line that is not blank. Raises InputError naming the file or the line."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            place = f"{path}:{number}"
            if line.strip():
                try:
                    value = parse_line(line)
                except InputError as error:
                    raise InputError(f"{place}: {error}") from error
                yield place, value


def has_lines(stream: BinaryIO) -> bool:
    """Whether the first non-blank line of a file is a complete value, and not an array of the others."""
    line = next((line for line in stream if line.strip()), b"")
    if line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"["):
        return False
    try:
        parse_line(line)
    except InputError:
        return False
    return True


def read_elements(text: str, offset: int = 0, stop: float = math.inf) -> Iterator[tuple[int, str]]:
    """Yields (offset, text) of the elements of an array, or of a single value, that begin in [offset, stop).

    Raises InputError, beginning with the line number, if the text is malformed.
    """
    begin = _BLANK.match(text).end()
    array = text[begin : begin + 1] == "["
    at = _BLANK.match(text, max(offset, begin + array)).end()
    if array and text[at : at + 1] == "]" and not offset:  # an empty one
        _expect_end(text, at + 1)
        return
    while at < stop and (array or at < len(text)):
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _malformed(text, getattr(error, "pos", at), getattr(error, "msg", error)) from error
        yield at, text[at:end]
        end = _BLANK.match(text, end).end()
        if not array:
            return _expect_end(text, end)
        if text[end : end + 1] == "]":
            return _expect_end(text, end + 1)
        if text[end : end + 1] != ",":
            raise _malformed(text, end, "Expecting ',' delimiter")
        at = _BLANK.match(text, end + 1).end()


def _expect_end(text: str, at: int) -> None:
    if (end := _BLANK.match(text, at).end()) < len(text):
        raise _malformed(text, end, "Extra data")


def _malformed(text: str, at: int, why) -> InputError:
    line = text.count("\n", 0, at) + 1
    return InputError(f"{line}: malformed JSON ({why})")


def beside(taken: Collection[str], values: dict) -> dict:
    """The values under new names: "generated_NAME" if NAME is taken."""
    renamed = {}
    for name, value in values.items():
        while name in taken:
            name = f"generated_{name}"
        renamed[name] = value
    return renamed


def prepare(path: str | os.PathLike | None) -> None:
    """Creates the folder of an output file (None: no file) before its contents are computed.

    Raises InputError naming the path if it cannot be written.
    """
    if path is None:
        return
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: {'a folder' if Path(path).is_dir() else 'its folder cannot be written'}")


def write_values(path: str | os.PathLike, values: Iterable) -> None:
    """Writes one value per line."""
    partial = Path(f"{path}.partial")
    partial.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    partial.replace(path)
