"""Random access to the records of a packed dataset of any size; a shard is opened at its first read."""

import bisect
import collections
import itertools
import os
import resource
import threading
import weakref
from collections.abc import Sequence

from array_record.python.array_record_module import ArrayRecordReader

from llada_jax.errors import InputError

_OPTIONS = "readahead_buffer_size:0"  # records are read one by one, anywhere
_BUFFER_BYTES = 1 << 15


class CorruptRecord(ValueError):
    """The record exists, but is not what was written."""


class RecordShards:
    """The records of `shards` [(file name, number of records)] in `folder`, numbered consecutively.

    The constructor lists the folder once and opens nothing. Opening a shard reads its index (for 65,536 records: 10 ms
    and 0.5 MB), so the most recently read shards stay open: over all objects of this class, at most half of the files
    that the process may open (`ulimit -n`). Thread-safe. Raises InputError naming the first missing shard.
    """

    _all: weakref.WeakSet = weakref.WeakSet()  # open files are the process's, whatever the object

    def __init__(self, folder: str, shards: Sequence[tuple[str, int]]):
        try:
            present = set(os.listdir(folder))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from error
        for name, _ in shards:
            if name not in present:
                raise InputError(f"{os.path.join(folder, name)}: missing shard")
        self._folder, self._shards = folder, shards
        self._ends = list(itertools.accumulate(count for _, count in shards))
        self._open: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._all.add(self)

    def place(self, index: int) -> str:
        """Names a record for an error message: file and number within it."""
        path, record, _ = self._locate(index)
        return f"{path}: record {record}"

    def read(self, index: int) -> bytes:
        """The record. Raises CorruptRecord with the reason, or InputError naming the file if it cannot be read."""
        path, record, shard = self._locate(index)
        try:
            return self._reader(shard, path).read([record])[0]
        except (RuntimeError, ValueError, IndexError):
            with self._lock:
                self._open.pop(shard, None)
        # Once more from the start: a store may have failed us, or the file have been mended since it was opened.
        try:
            with open(path, "rb") as stream:
                stream.read(1)
            return self._reader(shard, path).read([record])[0]
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptRecord(" ".join(str(error).split())) from error

    def _locate(self, index: int) -> tuple[str, int, int]:
        """(path, number in the shard, number of the shard)"""
        shard = bisect.bisect_right(self._ends, index)
        name, count = self._shards[shard]
        return os.path.join(self._folder, name), index - self._ends[shard] + count, shard

    def _reader(self, shard: int, path: str) -> ArrayRecordReader:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
        expected = self._shards[shard][1]
        if reader.num_records() != expected:
            raise ValueError(f"the shard holds {reader.num_records()} records instead of {expected}")
        most = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // len(self._all))
        with self._lock:
            self._open[shard] = reader
            while len(self._open) > most:
                self._open.popitem(last=False)  # closed when no thread reads it any more
        return reader
