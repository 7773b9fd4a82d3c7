"""Streams tensors from one store to another in slabs that fit in memory, several at once, each once.

A `Leaf` is a tensor that does not exist yet: its slabs are read, computed and digested (digest.py) while others are
written. Finished slabs are noted beside the partial output, so that a killed run resumes where it stopped.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from etils import epath

from llada_jax.checkpoint import digest, files
from llada_jax.errors import InputError
from llada_jax.model.parameters import Parameter

# A few threads wait for the disk while others compute; each holds about three slabs.
THREADS = min(6, 2 * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor to be written. read(a, b) returns indices a to b along `axis`, and all indices of the other axes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    axis: int = 0

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def leaf_of(name: str, array: np.ndarray) -> Leaf:
    """The leaf of an array in memory."""
    array = np.asarray(array)
    return Leaf(name, array.shape, array.dtype, lambda a, b: array[a:b] if array.ndim else array)


def split_axis(parameter: Parameter) -> int:
    """The axis that slabs cut: its indices are whole experts, or whole rows of the Hugging Face tensor."""
    if parameter.per_expert or not parameter.matrix:
        return 0
    return parameter.num_inputs


def target_dtype(name: str, stored: np.dtype, requested: np.dtype | None) -> np.dtype:
    """The dtype to write: `requested`, or the stored one if that is None. A float32 expert bias stays float32: at a
    lower precision, scores that the router compares would tie."""
    keep = name.endswith("expert_bias") and stored == np.float32
    return stored if requested is None or keep else np.dtype(requested)


def slabs(shape: tuple[int, ...], itemsize: int, axis: int, step: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields (first, last) bounds along `axis`, `step` indices each; by default about files.SLAB_BYTES."""
    size = shape[axis] if shape else 1
    step = step or files.slab_length(shape, itemsize, axis)
    for first in range(0, max(size, 1), step):
        yield first, min(first + step, size)


def each_done(function: Callable, tasks: Iterable[tuple]) -> Iterator:
    """Yields function(*task) for all tasks, run on threads, in order of completion. After an error, tasks that run are
    finished and the others cancelled.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(function: Callable, tasks: Iterable[tuple]) -> Iterator:
    """Yields function(*task) for all tasks, run on threads, in the order of the tasks; a few run ahead."""
    tasks = iter(tasks)
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = collections.deque(pool.submit(function, *task) for task in itertools.islice(tasks, THREADS))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(function, *task) for task in itertools.islice(tasks, 1))
        finally:
            pool.shutdown(cancel_futures=True)


class Notes:
    """A run's finished items, in a directory beside its partial output: one small file per item."""

    def __init__(self, directory: epath.Path):
        self._directory = directory

    def read(self) -> dict[str, str]:
        """{item: its text}."""
        return {path.name: path.read_text() for path in self._directory.iterdir() if path.name != _IDENTITY}

    def add(self, item: str, text: str) -> None:
        (self._directory / item).write_text(text)


_IDENTITY = "identity"
_BOOT = epath.Path("/proc/sys/kernel/random/boot_id")


def since_boot() -> str:
    """An id that changes when the machine restarts, which may lose data that was not yet on the disk."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


def identity_of(*values) -> str:
    """A sha256 of the JSON values that determine an output."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def partial(out: epath.Path, identity: str | None) -> Iterator[tuple[epath.Path, Notes]]:
    """Yields (a directory that becomes `out` when the block ends, notes of what it already holds).

    The directory is hidden and beside `out`. On an object store, which cannot rename, it is `out` itself, and the file
    that marks it as complete must be written last. If the block raises InputError, everything is removed. After any
    other failure (kill -9, a full disk), the next run with the same `identity` resumes; one with another identity, or
    None, starts again. Raises InputError if `out` exists and is not an empty directory.
    """
    directory = out.parent / f".{out.name}.partial" if files.is_local(out) else out
    notes = out.parent / f".{out.name}.resume"
    going_on = directory.exists() and identity is not None and _read_identity(notes) == identity
    in_the_way = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if in_the_way and not (going_on and directory == out and not files.is_complete(out)):
        what = "exists already" if files.is_complete(out) or files.is_local(out) else "holds an incomplete checkpoint"
        raise InputError(f"{out}: {what}; remove it or choose another directory")
    if going_on:
        print(f"going on with {directory}, which an interrupted run left", file=sys.stderr)
    else:
        _remove(notes)
        if directory.exists() and directory != out:
            print(f"removing {directory}, which an interrupted run left", file=sys.stderr)
            directory.rmtree()
        directory.mkdir(parents=True, exist_ok=True)
        notes.mkdir(parents=True)
        (notes / _IDENTITY).write_text(str(identity))
    try:
        yield directory, Notes(notes)
        if directory != out:
            files.sync(directory)
            os.replace(directory, out)
        _remove(notes)
    except BaseException as error:
        if identity is None or isinstance(error, InputError):
            _remove(notes)
            directory.rmtree(missing_ok=True)
        raise


def _read_identity(notes: epath.Path) -> str | None:
    path = notes / _IDENTITY
    return path.read_text() if path.exists() else None


def _remove(notes: epath.Path) -> None:
    (notes / _IDENTITY).unlink(missing_ok=True)  # first: without it the rest counts for nothing
    notes.rmtree(missing_ok=True)


def write_tensors(
    folder: epath.Path, leaves: Sequence[Leaf], notes: Notes, advance: Callable[[int], None]
) -> dict[str, files.TensorEntry]:
    """Writes the tensors of one folder, skips slabs that are noted, and notes each slab once it is written."""
    writer = files.TensorWriter(folder)
    sums = {leaf.name: np.zeros(2, np.uint32) for leaf in leaves}
    done = {item: text for item, text in notes.read().items() if len(text) == 16}  # a torn note is none

    def write(leaf: Leaf, first: int, last: int) -> tuple[str, int, np.ndarray]:
        item = f"{leaf.name}.{first}"
        size = (last - first) * leaf.nbytes // max(leaf.shape[leaf.axis] if leaf.shape else 1, 1)
        if item in done:
            return leaf.name, size, digest.from_hex(done[item])
        value = leaf.read(first, last)
        written = writer.write(leaf, first, value)
        start = [0] * value.ndim
        if start:
            start[leaf.axis] = first
        lanes = digest.host_lanes(value, tuple(start), leaf.shape)
        written.result()
        notes.add(item, digest.to_hex(lanes))
        return leaf.name, size, lanes

    tasks = ((leaf, *bounds) for leaf in leaves for bounds in slabs(leaf.shape, leaf.dtype.itemsize, leaf.axis))
    for name, size, lanes in each_done(write, tasks):
        sums[name] += lanes
        advance(size)
    writer.close([leaf.name for leaf in leaves])
    return {leaf.name: files.TensorEntry(leaf.shape, leaf.dtype, digest.to_hex(sums[leaf.name])) for leaf in leaves}
