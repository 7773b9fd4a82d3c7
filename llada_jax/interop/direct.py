"""Reads and writes large local files past the page cache (O_DIRECT), if the file system allows it.

Data that is used once is not worth the extra copy, nor the cached pages that it would evict.
"""

import mmap
import os
import threading

import numpy as np

_ALIGN = 4096  # of addresses, offsets and lengths: at least the logical block of any disk
_BUFFER_BYTES = 16 * 2**20
_FLAG = getattr(os, "O_DIRECT", 0)  # no such thing on macOS


def read_into(path: str, offset: int, out: memoryview) -> int:
    """Fills `out` (bytes) from `offset`; returns the number of bytes read. Thread-safe. Raises OSError."""
    file = _open(path, os.O_RDONLY)
    try:
        buffer, done = _scratch(), 0
        while done < len(out):
            skip = (offset + done) % _ALIGN
            size = min(-(-(skip + len(out) - done) // _ALIGN) * _ALIGN, _BUFFER_BYTES)
            count = os.preadv(file, [buffer[:size]], offset + done - skip) - skip
            if count <= 0:
                break
            count = min(count, len(out) - done)
            # numpy lets other threads run while it copies.
            np.copyto(np.frombuffer(out[done : done + count], np.uint8), np.frombuffer(buffer, np.uint8, count, skip))
            done += count
        return done
    finally:
        os.close(file)


class Writer:
    """A new file, written sequentially; when its `with` block ends, all data is on the disk. Raises OSError."""

    def __init__(self, path: str):
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._buffer, self._filled, self._size = mmap.mmap(-1, _BUFFER_BYTES), 0, 0

    def write(self, data: memoryview | bytes) -> None:
        data = np.frombuffer(data, np.uint8)
        while data.size:
            count = min(data.size, _BUFFER_BYTES - self._filled)
            np.frombuffer(self._buffer, np.uint8)[self._filled : self._filled + count] = data[:count]
            self._filled, self._size, data = self._filled + count, self._size + count, data[count:]
            if self._filled == _BUFFER_BYTES:
                self._flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._flush()
                os.ftruncate(self._file, self._size)  # what was written last was rounded up to whole blocks
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def _flush(self) -> None:
        left = memoryview(self._buffer)[: -(-self._filled // _ALIGN) * _ALIGN]
        while left:
            left = left[os.write(self._file, left) :]
        self._filled = 0


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | _FLAG | os.O_CLOEXEC, 0o666)
    except OSError:  # the file system has no direct I/O, or the file cannot be opened, which the next line says
        return os.open(path, flags | os.O_CLOEXEC, 0o666)


_THREAD = threading.local()


def _scratch() -> memoryview:
    """Page-aligned memory of this thread."""
    if not hasattr(_THREAD, "buffer"):
        _THREAD.buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
    return _THREAD.buffer
