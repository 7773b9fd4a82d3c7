"""JSON lines: one line parsed, a file read with the place of each line, a file written whole or not at all."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from llada_jax.errors import InputError


def parse_line(line: bytes):
    """The JSON value on a line. Raises InputError, without the place, when it is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON ({getattr(error, 'msg', error)})") from error


def read_values(path: str | os.PathLike) -> Iterator[tuple[str, object]]:
    """Yields ("path:line", value) for the lines that are not blank. Raises InputError naming the file, or the place."""
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


def beside(taken: Collection[str], values: dict) -> dict:
    """The values under names that are not taken: "generated_NAME" where NAME is."""
    found = {}
    for name, value in values.items():
        while name in taken:
            name = f"generated_{name}"
        found[name] = value
    return found


def prepare(path: str | os.PathLike | None) -> None:
    """Makes the folder that a file (None: of no file) is going to be written in, before what it will hold is computed.

    Raises InputError naming the path where that cannot be.
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
    """Writes one value a line."""
    partial = Path(f"{path}.partial")
    partial.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    partial.replace(path)
