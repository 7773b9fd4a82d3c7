"""The files of a source: a file, a folder, or a dataset saved by `save_to_disk` of Hugging Face's `datasets`."""

import contextlib
import fnmatch
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO

import pyarrow as pa

from llada_jax.data import jsonl, tables
from llada_jax.errors import InputError

# A .json file is "jsonl" if its lines are values, else "json": an array of them, or one value.
_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet", ".json")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".json")
# Files beside the data that are not data.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "_SUCCESS")
_DESCRIPTION_PATTERNS = ("readme*", "license*", "notice*", "*.md", "*.rst", "*.crc", "*.py")
# Files that hold data in formats that are not read here: without them a folder would silently be a part of its data.
_UNREAD = (
    ".bz2", ".xz", ".lz4", ".lzma", ".br", ".gz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".csv", ".tsv", ".arrow",
    ".feather", ".orc", ".avro", ".xlsx", ".npy", ".npz", ".pkl", ".h5", ".tfrecord", ".array_record",
)  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """One input file: `name` is its path relative to the source, `format` is text, jsonl, json, parquet or arrow.

    `compression` is gzip, zstd or "".
    """

    path: str
    name: str
    bytes: int
    format: str
    compression: str = ""

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens the file's decompressed contents. Raises InputError naming the file if it cannot be read."""
        try:
            with open(self.path, "rb") as stream:
                if not self.compression:
                    yield stream
                    return
                with pa.input_stream(stream, compression=self.compression) as inner:
                    yield io.BufferedReader(inner)
        except OSError as error:
            reason = (str(error.strerror or error).splitlines() or ["unknown error"])[0]
            raise InputError(f"{self.path}: {reason}") from error


# (file index, offset): bytes of lines, decompressed; characters of a json file; rows of a table; 0 in a text file
Position = tuple[int, int]


def list_files(
    source: str, suffixes: Sequence[str] = TEXT_SUFFIXES, patterns: Sequence[str] = (), split: str = ""
) -> list[SourceFile]:
    """Lists the readable files of `source`: one file, a folder, or a saved dataset.

    A folder is searched recursively for names that end in one of `suffixes`, or match one of `patterns` (e.g. "*.py"),
    which makes them plain text. Names that begin with a dot are skipped, and files are sorted by relative path. Text
    and line files may be compressed, with .gz or .zst after their name. Other files are named on stderr; it is an error
    if they hold data and there are no `patterns`. With patterns, .json files are read only if they match.

    A saved dataset (`datasets.save_to_disk`) consists of the Arrow files that its state.json names, in that order; of a
    DatasetDict, those of `split`, which may be omitted if there is only one. Raises InputError if nothing is readable.
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
    suffixes = [suffix for suffix in suffixes if not (patterns and suffix == ".json")]
    formats = {name: _format(name, suffixes, patterns) for name in names}
    _say_what_is_not_read(source, [name for name, reading in formats.items() if reading is None], bool(patterns))
    files = [_file(root, name, *reading) for name, reading in formats.items() if reading is not None]
    if not files:
        readable = ", ".join([f"*{suffix}" for suffix in suffixes if suffix != ".ndjson"] + list(patterns))
        raise InputError(f"{source}: empty dataset, no file matches {readable}, nor is it a saved dataset")
    for name in names:
        if name + ".gz" in formats or name + ".zst" in formats:
            raise InputError(f"{source}: {name} is there compressed too, so it would be read twice")
    return files


def _say_what_is_not_read(source: str, names: Sequence[str], chosen: bool) -> None:
    """Names unread files on stderr. Raises InputError naming one that holds data, unless patterns chose the files."""
    if not os.path.isdir(source):
        return
    names = [name for name in names if not _describes(os.path.basename(name))]
    data = [name for name in names if os.path.splitext(name)[1].lower() in _UNREAD]
    if data and not chosen:
        raise InputError(
            f"{source}: {data[0]}{f' and {len(data) - 1} others' if data[1:] else ''} cannot be read; convert it to "
            ".jsonl or .parquet, or take it out of the folder"
        )
    if names:
        more = f" and {len(names) - 5} others" if len(names) > 5 else ""
        print(f"{source}: not read: {', '.join(names[:5])}{more}", file=sys.stderr)


def _describes(base: str) -> bool:
    patterns = _DESCRIPTION_PATTERNS
    return base in _DESCRIPTIONS or any(fnmatch.fnmatchcase(base.lower(), pattern) for pattern in patterns)


def content_digest(files: Sequence[SourceFile]) -> str:
    """sha256 (hex) over the names and bytes of the files. Reads all of them at about 1 GB/s per core, which is fast
    compared with tokenising. Raises InputError naming a file that cannot be read.
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
    """Yields (file index, first offset, end) of the files with something in [start, stop).

    The end is infinity for files that are read to their end; without `stop`, for all.
    """
    last, end = stop or (len(files), 0)
    for index in range(start[0], min(len(files), last + (end > 0))):
        yield index, start[1] if index == start[0] else 0, end if index == last else math.inf


def bytes_before(files: Sequence[SourceFile], position: Position) -> int:
    """Input bytes before the document at (file index, offset); within a table, in proportion to rows."""
    index, offset = position
    whole = sum(file.bytes for file in files[:index])
    if index < len(files) and files[index].format in tables.FORMATS:
        offset = files[index].bytes * offset // max(1, tables.count_rows(files[index].path, files[index].format))
    return whole + (min(offset, files[index].bytes) if offset else 0)  # decompressed, there may be more of them


def place(file: SourceFile, offset: int) -> str:
    """Names a document or row for an error message: path:line, or path:row N of a table."""
    if file.format in tables.FORMATS:
        return f"{file.path}:row {offset}"
    lines = 1  # counted only now, so that a restart need not read the file's beginning
    if file.format == "json":
        return f"{file.path}:{read_text(file).count(chr(10), 0, offset) + 1}"
    with file.open() as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 20))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return f"{file.path}:{lines}"


def read_text(file: SourceFile) -> str:
    """The text of a file. Raises InputError naming the file, and the line that is not UTF-8."""
    with file.open() as stream:
        data = stream.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file.path}:{line}: not UTF-8") from error


def _file(root: str, name: str, file_format: str, compression: str = "") -> SourceFile:
    path = os.path.join(root, name)
    try:
        file = SourceFile(path, name, os.path.getsize(path), file_format, compression)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if file_format != "json":
        return file
    with file.open() as stream:
        return replace(file, format="jsonl") if jsonl.has_lines(stream) else file


def _saved_dataset(folder: str, split: str) -> list[str] | None:
    """The Arrow files of a saved Dataset or DatasetDict, relative to the folder; None if it is something else.

    The folder may also hold cached Arrow files; only state.json tells which ones are rows.
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


def _format(name: str, suffixes: Sequence[str], patterns: Sequence[str]) -> tuple[str, str] | None:
    """(format, compression) of a file to read, else None."""
    base = os.path.basename(name)
    if any(fnmatch.fnmatchcase(base, pattern) for pattern in patterns):
        return "text", ""
    if base in _DESCRIPTIONS:
        return None
    stem, suffix = os.path.splitext(base)
    compression = _COMPRESSIONS.get(suffix, "")
    suffix = os.path.splitext(stem)[1] if compression else suffix
    readable = suffix in suffixes and not (compression and _FORMATS[suffix] in tables.FORMATS)
    return (_FORMATS[suffix], compression) if readable else None
