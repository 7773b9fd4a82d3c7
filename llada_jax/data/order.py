"""The order of training rows: a pure function from step to rows, read by random access from a packed dataset."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import flax.struct
import grain
import numpy as np

from llada_jax.data.rows import Row, decode_row, read_dataset
from llada_jax.errors import InputError


@flax.struct.dataclass
class Batch:
    """Rows of one step.

    ids [rows, length] int32; segment_ids [rows, length] int32, 0 on padding; supervised [rows, length] bool;
    row_ids [rows] uint32, the stored indices of the rows; epochs [rows] uint32.
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    supervised: np.ndarray
    row_ids: np.ndarray
    epochs: np.ndarray


class Rows:
    """Random access to the stored rows [start, stop) of a packed dataset, shuffled anew in every epoch.

    Opening reads dataset.json only. The order depends on `seed` (non-negative), the range and nothing else; without
    `shuffle` it is the stored order. Raises InputError if the dataset is missing or incomplete, the range is empty
    or exceeds it, or its rows are not of `expected_length` tokens (None takes any).

    Attributes: `length`, tokens in a row; `dataset`, the contents of dataset.json.
    """

    def __init__(
        self,
        path: str,
        seed: int,
        start: int = 0,
        stop: int | None = None,
        *,
        shuffle: bool = True,
        expected_length: int | None = None,
    ):
        self.dataset = read_dataset(path)
        self.length = self.dataset["length"]
        self._shards = [(os.path.join(path, name), rows) for name, rows in self.dataset["shards"]]
        stored = sum(rows for _, rows in self._shards)
        stop = stored if stop is None else stop
        if expected_length not in (None, self.length):
            raise InputError(f"{path}/dataset.json: length is {self.length}, not {expected_length}")
        if stored == 0:
            raise InputError(f"{path}/dataset.json: the dataset has no rows")
        if not 0 <= start < stop <= stored:
            raise InputError(f"{path}: rows [{start}, {stop}) are empty or exceed the {stored} stored rows")
        if seed < 0:
            raise InputError(f"seed {seed} must not be negative")
        for shard, _ in self._shards:
            if not os.path.isfile(shard):
                raise InputError(f"{shard}: missing shard")
        self._seed, self._start, self._count, self._shuffle = seed, start, stop - start, shuffle
        # With the number of rows in the path a shard is opened at its first read, not now.
        self._source = grain.sources.ArrayRecordDataSource([f"{shard}[0:{rows}]" for shard, rows in self._shards])

    def __len__(self) -> int:
        return self._count

    def at(self, n: int) -> tuple[Row, int, int]:
        """Returns (row, stored index of the row, epoch) of the n-th row of training, n = 0, 1, … without end.

        Raises InputError naming shard and index if the record is corrupt.
        """
        row_id, epoch = self._index(n)
        return self._read(row_id), row_id, epoch

    def batch(
        self, step: int, rows_per_step: int, offset: int = 0, which: slice | Sequence[int] = slice(None)
    ) -> Batch:
        """Returns rows offset + step * rows_per_step + i, for those i in range(rows_per_step) that `which` picks.

        Raises InputError naming shard and index if a record is corrupt.
        """
        wanted = offset + step * rows_per_step + np.arange(rows_per_step)[which]
        indices = [self._index(int(n)) for n in wanted]
        rows = [self._read(row_id) for row_id, _ in indices]
        shape = (len(rows), self.length)
        return Batch(
            ids=np.array([row.ids for row in rows], np.int32).reshape(shape),
            segment_ids=np.array([row.segment_ids for row in rows], np.int32).reshape(shape),
            supervised=np.array([row.supervised for row in rows], bool).reshape(shape),
            row_ids=np.array([row_id for row_id, _ in indices], np.uint32),
            epochs=np.array([epoch for _, epoch in indices], np.uint32),
        )

    def _index(self, n: int) -> tuple[int, int]:
        epoch, index = divmod(n, self._count)
        if self._shuffle:
            # Grain's own shuffle seeds epoch e with seed + e, which makes epoch 1 of seed 0 the epoch 0 of seed 1.
            seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
            index = grain.experimental.index_shuffle(index, max_index=self._count - 1, seed=seed, rounds=4)
        return self._start + index, epoch

    def _read(self, row_id: int) -> Row:
        try:
            row = decode_row(self._source[row_id])
            if len(row.ids) != self.length:
                raise ValueError(f"{len(row.ids)} tokens instead of {self.length}")
            return row
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{self._place(row_id)} is corrupt ({error})") from error

    def _place(self, row_id: int) -> str:
        for shard, rows in self._shards:
            if row_id < rows:
                return f"{shard}: record {row_id}"
            row_id -= rows
        raise IndexError(row_id)


def prefetch(
    rows: Rows,
    first_step: int,
    last_step: int,
    rows_per_step: int,
    offset: int = 0,
    which: slice | Sequence[int] = slice(None),
    depth: int = 2,
) -> Iterator[tuple[int, Batch]]:
    """Yields (step, rows.batch(step, …)) for first_step <= step < last_step, the next `depth` batches read ahead.

    A background thread reads; what it raises is raised here, in its place in the order. Closing the generator stops
    the thread.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    pending: deque = deque()
    try:
        for step in range(first_step, last_step + depth):
            if step < last_step:
                pending.append((step, pool.submit(rows.batch, step, rows_per_step, offset, which)))
            if step >= first_step + depth:
                done, batch = pending.popleft()
                yield done, batch.result()
    finally:
        pool.shutdown(cancel_futures=True)
