"""A file of float32 records that are costly to compute: appended one by one, so that a killed run goes on where it was.

The first line is JSON: what the records depend on, and their shape. The records follow, each with its CRC-32.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np

from llada_jax import config_renames
from llada_jax.errors import InputError

_FORMAT = 1
_REMEDY = "; remove the file to score again"


class ScoreFile:
    """`count` records of `shape`. Opening cuts off a record that was not written whole, and what follows it.

    depends_on: {name: JSON value}. writes: False on the processes that follow while one of them writes: they open after
    it and count, so that all agree on what is stored. Raises InputError when the file has records of other values,
    naming the first one; with `replace` it says so and begins anew.

    Attributes: `stored`, the number of records there are.
    """

    def __init__(
        self, path: str | os.PathLike, depends_on: dict, shape: tuple[int, ...], count: int, writes: bool = True,
        replace: bool = False,
    ):  # fmt: skip
        self._path, self._shape, self._count, self._writes = Path(path), shape, count, writes
        self._record = np.dtype([("values", "<f4", shape), ("crc", "<u4")])
        header = json.dumps({"format": _FORMAT, "depends_on": depends_on, "shape": shape, "count": count}) + "\n"
        if not (self._path.exists() and self._holds(json.loads(header), replace)):
            temporary = self._path.with_name(self._path.name + ".partial")
            temporary.write_text(header)
            temporary.replace(self._path)
        with open(self._path, "rb") as file:
            self._offset = len(file.readline())
        self.stored = self._cut()

    @property
    def complete(self) -> bool:
        return self.stored == self._count

    def append(self, values: np.ndarray) -> None:
        """Writes the next record, float32 of `shape`; returns when it is on disk."""
        if self._writes:
            values = np.ascontiguousarray(values, "<f4").reshape(self._shape)
            with open(self._path, "ab") as file:
                file.write(values.tobytes() + np.uint32(zlib.crc32(values)).astype("<u4").tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.stored += 1

    def read(self) -> np.ndarray:
        """The stored records, float32 [stored, *shape], mapped from the file."""
        return self._map(self.stored)["values"]

    def _holds(self, expected: dict, replace: bool) -> bool:
        """Whether the file is of these values; else, unless it may be replaced, raises InputError."""
        try:
            self._check(expected)
        except InputError as error:
            if not replace:
                raise
            print(f"{str(error).removesuffix(_REMEDY)}: scoring again", flush=True)
            return False
        return True

    def _check(self, expected: dict) -> None:
        try:
            with open(self._path, "rb") as file:
                stored = json.loads(file.readline())
            before, now = _renamed(stored["depends_on"]), expected["depends_on"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: not a file of scores{_REMEDY}") from error
        for name in [*now, *(name for name in before if name not in now)]:
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{self._path}: scored with {name}={before.get(name)!r}, this run has {now.get(name)!r}{_REMEDY}"
                )
        if stored | {"depends_on": before} != expected:
            raise InputError(f"{self._path}: of another format{_REMEDY}")

    def _cut(self) -> int:
        """Truncates after the last record before which all are intact; returns their number."""
        whole = (self._path.stat().st_size - self._offset) // self._record.itemsize
        records = self._map(min(whole, self._count))
        good = next((i for i, r in enumerate(records) if zlib.crc32(r["values"].tobytes()) != r["crc"]), len(records))
        if self._writes:
            os.truncate(self._path, self._offset + good * self._record.itemsize)
        return good

    def _map(self, records: int) -> np.ndarray:
        if not records:
            return np.zeros(0, self._record)
        return np.memmap(self._path, self._record, "r", self._offset, (records,))


def _renamed(depends_on: dict) -> dict:
    """{name: value} by the names that the fields of the config have now."""
    fields = {name.removeprefix("config."): value for name, value in depends_on.items() if name.startswith("config.")}
    now = {f"config.{name}": value for name, value in config_renames.current(fields)[0].items()}
    return {name: value for name, value in depends_on.items() if not name.startswith("config.")} | now
