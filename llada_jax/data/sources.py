"""Which files a source is: a file, a folder, or what `save_to_disk` of Hugging Face's `datasets` wrote."""

import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llada_jax.data import tables
from llada_jax.errors import InputError

_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
TEXT_SUFFIXES = tuple(_FORMATS)
ROW_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class SourceFile:
    """One input file: `name` is its path relative to the source, `format` is text, jsonl, parquet or arrow."""

    path: str
    name: str
    bytes: int
    format: str


Position = tuple[int, int]  # (file index, offset): bytes in a .jsonl file, rows in a table, 0 in a text file


def list_files(
    source: str, suffixes: Sequence[str] = TEXT_SUFFIXES, patterns: Sequence[str] = (), split: str = ""
) -> list[SourceFile]:
    """Lists the readable files of `source`: one file, a folder, or a saved dataset.

    A folder is searched recursively for names that end in one of `suffixes`, or match one of `patterns` (e.g. "*.py")
    and are then plain text; names that begin with a dot are skipped, and the files are sorted by relative path. A saved
    dataset (`datasets.save_to_disk`) is the Arrow files that its state.json names, in that order; of a DatasetDict,
    those of `split`, which may be left out if there is only one. Raises InputError if nothing readable is found.
    """
    if os.path.isfile(source):
        root, names = os.path.dirname(source), [os.path.basename(source)]
    elif os.path.isdir(source):
        root, names = source, _saved_dataset(source, split)
        if names is not None:
            return [_file(root, name, "arrow") for name in names]
        names = sorted(_walk(source))
    else:
        raise InputError(f"{source}: no such file or folder")
    if split:
        raise InputError(f"{source}: split {split!r} asked for, but there is no dataset_dict.json")
    formats = [(name, _format(name, suffixes, patterns)) for name in names]
    files = [_file(root, name, file_format) for name, file_format in formats if file_format is not None]
    if not files:
        readable = ", ".join([f"*{suffix}" for suffix in suffixes] + list(patterns))
        raise InputError(f"{source}: empty dataset, no file matches {readable}, nor is it a saved dataset")
    return files


def content_digest(files: Sequence[SourceFile]) -> str:
    """sha256 (hex) over the names and the bytes of the files. All are read, at about 1 GB/s a core: nothing beside
    tokenising them. Raises InputError naming a file that cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_file_digest, files))
    return hashlib.sha256(
        json.dumps([[f.name, each] for f, each in zip(files, digests, strict=True)]).encode()
    ).hexdigest()


def _file_digest(file: SourceFile) -> str:
    try:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file.path}: {error.strerror}") from error


def ranges(files: Sequence[SourceFile], start: Position, stop: Position | None) -> Iterator[tuple[int, int, float]]:
    """Yields (file index, first offset, end) for the files that hold something in [start, stop).

    The end is infinity in a file that is wanted to its end, and so everywhere without `stop`.
    """
    last, end = stop or (len(files), 0)
    for index in range(start[0], min(len(files), last + (end > 0))):
        yield index, start[1] if index == start[0] else 0, end if index == last else math.inf


def bytes_before(files: Sequence[SourceFile], position: Position) -> int:
    """Input bytes that precede the document at (file index, offset); within a table in proportion to rows."""
    index, offset = position
    whole = sum(file.bytes for file in files[:index])
    if index < len(files) and files[index].format in tables.FORMATS:
        offset = files[index].bytes * offset // max(1, tables.count_rows(files[index].path, files[index].format))
    return whole + offset


def place(file: SourceFile, offset: int) -> str:
    """Names a document or row in an error: path:line, or path:row N of a table."""
    if file.format in tables.FORMATS:
        return f"{file.path}:row {offset}"
    lines = 1  # counted only now, so that a restart need not read the file's beginning
    with open(file.path, "rb") as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 20))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return f"{file.path}:{lines}"


def _file(root: str, name: str, file_format: str) -> SourceFile:
    path = os.path.join(root, name)
    try:
        return SourceFile(path, name, os.path.getsize(path), file_format)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _saved_dataset(folder: str, split: str) -> list[str] | None:
    """The Arrow files of a saved Dataset or DatasetDict, relative to the folder; None if it is something else.

    A folder of a dataset may hold other Arrow files, caches of it, so only state.json says which ones are its rows.
    """
    dictionary, part = os.path.join(folder, "dataset_dict.json"), ""
    if os.path.isfile(dictionary):
        splits = _read_list(dictionary, "splits", str)
        if split not in splits and (split or len(splits) != 1):
            wrong = f"split {split!r} is none of" if split else "choose one of the splits"
            raise InputError(f"{folder}: {wrong} {', '.join(splits)} (--split)")
        part = split or splits[0]
    elif split or not all(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_info.json")):
        return None
    state = os.path.join(folder, part, "state.json")
    entries = _read_list(state, "_data_files", dict)
    if not all(isinstance(entry.get("filename"), str) for entry in entries):
        raise InputError(f"{state}: _data_files has an entry without filename")
    return [os.path.join(part, entry["filename"]) for entry in entries]


def _read_list(path: str, key: str, kind: type) -> list:
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({error})") from error
    entries = value.get(key) if isinstance(value, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, kind) for entry in entries):
        raise InputError(f"{path}: {key} is not a list of at least one {kind.__name__}")
    return entries


def _walk(folder: str) -> Iterator[str]:
    def stop(error: OSError):
        raise InputError(f"{error.filename}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        for name in names:
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(relative, name))


def _format(name: str, suffixes: Sequence[str], patterns: Sequence[str]) -> str | None:
    base = os.path.basename(name)
    if any(fnmatch.fnmatchcase(base, pattern) for pattern in patterns):
        return "text"
    suffix = os.path.splitext(base)[1]
    return _FORMATS[suffix] if suffix in suffixes else None
