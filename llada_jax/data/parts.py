"""Reads a source in parts, in its order, by one process or several.

A part (start, stop) holds what begins at or after `start` and before `stop`. Results are concatenated in order, so the
number of processes changes only the time.
"""

import collections
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection

from llada_jax.data import tables
from llada_jax.data.sources import Position, SourceFile
from llada_jax.errors import InputError

Read = Callable[[Position, Position], Iterable]

_PART_BYTES = 8 << 20
_PARTS_AHEAD = 2  # of each process


def split(files: Sequence[SourceFile], start: Position) -> Iterator[tuple[Position, Position]]:
    """Yields the (start, stop) of the parts from `start` to the end of the files.

    A part has about 8 MiB of input: many small files, or some lines or row groups of a large one. A text file, a
    compressed or .json file, a line and a row group are never divided.
    """
    begin, total = start, 0
    for index in range(start[0], len(files)):
        for offset, size in _pieces(files[index], start[1] if index == start[0] else 0):
            if total >= _PART_BYTES:
                yield begin, (index, offset)
                begin, total = (index, offset), 0
            total += size
    yield begin, (len(files), 0)


def read_parts(read: Read, files: Sequence[SourceFile], start: Position, processes: int = 1) -> Iterator:
    """Yields the items of read(start, stop) for all parts of the files from `start` on, in order.

    With more than one process, `read` and its items must be picklable. An InputError of a process is raised here, and
    so is one if a process dies. Closing the generator ends the processes.
    """
    if processes < 1:
        raise InputError(f"processes {processes} must be at least 1")
    if processes == 1:
        for part in split(files, start):
            yield from read(*part)
        return
    workers = [_Worker(read) for _ in range(processes)]
    try:
        awaited = collections.deque()
        for part, worker in zip(split(files, start), itertools.cycle(workers), strict=False):
            worker.give(part)
            awaited.append(worker)
            if len(awaited) == _PARTS_AHEAD * processes:
                yield from awaited.popleft().take()
        for worker in awaited:
            yield from worker.take()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that calls `read`. It ends when this process ends, in any way."""

    def __init__(self, read: Read):
        # Not forked from this process, which may hold threads and locks; its imports are made once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "llada_jax.data.pack_examples"])
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(read, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, part: tuple[Position, Position]) -> None:
        try:
            self._channel.send(part)
        except OSError as error:
            raise self._death() from error

    def take(self) -> list:
        try:
            answer = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, InputError):
            raise answer
        return answer

    def end(self) -> None:
        self._channel.close()
        self._process.terminate()
        self._process.join()

    def _death(self) -> InputError:
        self._process.join()
        return InputError(
            f"--processes: one of them ended with exit code {self._process.exitcode} (-9: perhaps there was too little "
            "memory); packing goes on from the last whole shard when it is started again"
        )


def _serve(read: Read, channel: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that packs
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are shared out by process
    try:
        while True:
            part = channel.recv()
            try:
                answer = list(read(*part))
            except InputError as error:
                answer = error
            channel.send(answer)
    except (EOFError, ConnectionError):
        return  # the process that packs is gone


def _pieces(file: SourceFile, offset: int) -> Iterator[tuple[int, int]]:
    """Yields (offset, bytes until the next one) of the positions from `offset` on where a part may begin."""
    if file.format in ("text", "json") or file.compression:
        yield offset, file.bytes
    elif file.format == "jsonl":
        yield from _line_starts(file, offset)
    else:
        yield from _group_starts(file, offset)


def _line_starts(file: SourceFile, offset: int) -> Iterator[tuple[int, int]]:
    try:
        with open(file.path, "rb") as stream:
            while offset + _PART_BYTES < file.bytes:
                stream.seek(offset + _PART_BYTES - 1)
                stream.readline()
                yield offset, stream.tell() - offset
                offset = stream.tell()
    except OSError:
        pass  # whoever reads the part says so, at its place in the order
    yield offset, max(0, file.bytes - offset)


def _group_starts(file: SourceFile, offset: int) -> Iterator[tuple[int, int]]:
    try:
        groups = tables.row_groups(file.path, file.format)
    except InputError:
        groups = []  # as above
    row_bytes = file.bytes / max(1, sum(groups))
    for end in itertools.accumulate(groups):
        if end > offset:
            yield offset, int((end - offset) * row_bytes)
            offset = end
    if not groups:
        yield offset, file.bytes
