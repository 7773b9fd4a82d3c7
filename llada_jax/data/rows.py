"""The storage format of a packed dataset: rows as msgpack records, and dataset.json."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np

from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

FORMAT = "llada-jax-rows-1"


@dataclass(frozen=True)
class Row:
    """One packed row.

    ids [length] int32; segment_ids [length] int32, 0 on padding and 1, 2, … for the documents of this row;
    supervised [length] bool, False on padding; sources, one (file index, offset) for each document of the row.
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    supervised: np.ndarray
    sources: tuple[tuple[int, int], ...]


def encode_row(
    ids: np.ndarray,
    starts: Sequence[int],
    lengths: Sequence[int],
    sources: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]] = (),
) -> bytes:
    """Serialises one row for `decode_row`.

    ids [length] int32; document d occupies ids[starts[d] : starts[d] + lengths[d]] and came from sources[d]. Positions
    inside the half-open `spans` are supervised. Without spans every token is; a row without supervised tokens has one
    empty span (0, 0).
    """
    arrays = {"ids": ids, "starts": starts, "lengths": lengths}
    pairs = {"sources": sources, "spans": spans}
    fields = {name: np.asarray(values, "<i4").tobytes() for name, values in arrays.items()}
    return msgpack.packb(fields | {name: [[int(a), int(b)] for a, b in values] for name, values in pairs.items()})


def decode_row(record: bytes) -> Row:
    """Reads one record written by `encode_row`. Raises ValueError if it is not one."""
    try:
        fields = msgpack.unpackb(record)
        ids, starts, lengths = (
            np.frombuffer(fields[name], "<i4").astype(np.int32) for name in ("ids", "starts", "lengths")
        )
        sources = tuple((file, offset) for file, offset in fields["sources"])
        spans = [(start, end) for start, end in fields["spans"]]
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"not a packed row ({error})") from error
    if not len(starts) == len(lengths) == len(sources):
        raise ValueError("not a packed row (starts, lengths and sources differ in number)")
    segment_ids = np.zeros(len(ids), np.int32)
    for segment, (start, length) in enumerate(zip(starts, lengths, strict=True), 1):
        segment_ids[start : start + length] = segment
    supervised = segment_ids > 0
    if spans:
        inside = np.zeros(len(ids), bool)
        for start, end in spans:
            inside[start:end] = True
        supervised &= inside
    return Row(ids, segment_ids, supervised, sources)


def read_dataset(path: str) -> dict:
    """Reads `path`/dataset.json. Raises InputError if the folder is missing, incomplete or of another format."""
    file = os.path.join(path, "dataset.json")
    if "://" in path:
        raise InputError(f"{path}: packed rows are read through a file system; mount the bucket (gcsfuse)")
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such folder")
    dataset = read_json(file)
    if dataset is None:
        raise InputError(f"{file}: missing, so the dataset is incomplete or was never packed")
    return dataset


def packed_with(dataset: dict, tokenizer: Tokenizer) -> bool:
    """Whether a dataset was packed with `tokenizer`: its files are equal or, if the dataset records it, the part of
    them that changes ids and texts is.
    """
    identity = tokenizer.identity(chat=dataset.get("kind", "text") != "text")
    return dataset["tokenizer_digest"] == tokenizer.digest or dataset.get("tokenizer_identity") == identity


def read_json(path: str) -> dict | None:
    """Reads dataset.json or progress.json; None if there is no such file. Raises InputError if it is not one."""
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path}: format is not {FORMAT}")
    return value
