"""The order of training rows: a pure function from step to rows, read by random access from packed datasets."""

import abc
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import flax.struct
import grain
import numpy as np

from llada_jax.data.rows import Row, decode_row, read_dataset
from llada_jax.data.shards import CorruptRecord, RecordShards
from llada_jax.errors import InputError

MAX_ROWS = 1 << 32  # the noise of a row is keyed by 32 bits


@flax.struct.dataclass
class Batch:
    """Rows of one step.

    ids [rows, length] int32; segment_ids [rows, length] int32, 0 on padding; supervised [rows, length] bool;
    row_ids [rows] uint32, which tell all stored rows apart; epochs [rows] uint32.
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    supervised: np.ndarray
    row_ids: np.ndarray
    epochs: np.ndarray


def make_batch(tokens, segment_ids=None, supervised=None) -> Batch:
    """Returns rows in memory as a Batch.

    tokens [rows, length] int. segment_ids [rows, length] int: packed documents, 0 is padding; None: each row is one
    document. supervised [rows, length] bool: tokens that may be masked and scored; None: all that are not padding.
    Raises InputError when the shapes differ.

    Example:
        >>> import llada_jax
        >>> batch = llada_jax.make_batch([[5, 6, 7, 0], [8, 9, 9, 9]], segment_ids=[[1, 1, 1, 0], [1, 1, 2, 2]])
        >>> batch.supervised.sum(axis=1).tolist()
        [3, 4]
    """
    ids = np.asarray(tokens, np.int32)
    if ids.ndim != 2:
        raise InputError(f"tokens has shape {ids.shape}, expected [rows, length]")
    segments = np.ones_like(ids) if segment_ids is None else np.asarray(segment_ids, np.int32)
    scored = segments > 0 if supervised is None else np.asarray(supervised, bool)
    for name, values in (("segment_ids", segments), ("supervised", scored)):
        if values.shape != ids.shape:
            raise InputError(f"{name} has shape {values.shape}, expected {ids.shape} as tokens")
    numbers = np.arange(len(ids), dtype=np.uint32)
    return Batch(ids, segments, scored & (segments > 0), numbers, np.zeros_like(numbers))


def shuffled(n: int, count: int, seed: int) -> tuple[int, int]:
    """Returns (index, epoch) of the n-th of an endless order, n = 0, 1, …: every epoch has each of range(count) once.

    The order of an epoch is a function of (seed, epoch).
    """
    epoch, index = divmod(n, count)
    # Grain's own shuffle seeds epoch e with seed + e, which makes epoch 1 of seed 0 the epoch 0 of seed 1.
    epoch_seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return grain.experimental.index_shuffle(index, max_index=count - 1, seed=epoch_seed, rounds=4), epoch


class Order(abc.ABC):
    """An endless order of rows: the interface of Rows and Mixture.

    Attributes: `length`, tokens per row; `digest`, hex, of everything that is stored.
    """

    length: int
    digest: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of different rows."""

    @abc.abstractmethod
    def index(self, n: int) -> tuple[int, int]:
        """Returns (id of the row, epoch) of the n-th row, n = 0, 1, …"""

    @abc.abstractmethod
    def read(self, row_id: int) -> Row:
        """Returns the row with an id. Raises InputError naming shard and index if it cannot be read."""

    def at(self, n: int) -> tuple[Row, int, int]:
        """Returns (row, id of the row, epoch) of the n-th row. Raises as `read`."""
        row_id, epoch = self.index(n)
        return self.read(row_id), row_id, epoch

    def batch(
        self, step: int, rows_per_step: int, offset: int = 0, which: slice | Sequence[int] = slice(None)
    ) -> Batch:
        """Returns the rows offset + step * rows_per_step + i for the i in range(rows_per_step) that `which` selects.

        Raises as `read`.
        """
        numbers = offset + step * rows_per_step + np.arange(rows_per_step)[which]
        indices = [self.index(int(n)) for n in numbers]
        rows = [self.read(row_id) for row_id, _ in indices]
        shape = (len(rows), self.length)
        return Batch(
            ids=np.array([row.ids for row in rows], np.int32).reshape(shape),
            segment_ids=np.array([row.segment_ids for row in rows], np.int32).reshape(shape),
            supervised=np.array([row.supervised for row in rows], bool).reshape(shape),
            row_ids=np.array([row_id for row_id, _ in indices], np.uint32),
            epochs=np.array([epoch for _, epoch in indices], np.uint32),
        )


class Rows(Order):
    """Random access to the stored rows [start, stop) of a packed dataset, shuffled again in every epoch.

    Opening reads dataset.json and lists the folder; no shard is opened. The id of a row is its stored index. The order
    depends only on `seed` (non-negative) and the range; without `shuffle` it is the stored order. Raises InputError if
    the dataset is missing or incomplete, if the range is empty or exceeds it, or if its rows do not have
    `expected_length` tokens (None accepts any).

    A corrupt row is read as padding: it has no token to learn from, and all other rows keep their places. So what is
    read for a row depends on that row alone, not on hosts, earlier steps or other rows. Each corrupt row is reported on
    stderr once. When more than `corrupt_share` of the stored rows are corrupt, `read` raises InputError; with the
    default of 0, at the first one.

    Attributes: `length`, tokens per row; `digest`; `dataset`, the contents of dataset.json; `stored`, the number of
    rows; `corrupt`, the ids of the corrupt rows found so far.
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
        corrupt_share: float = 0.0,
    ):
        self.dataset = read_dataset(path)
        self.length, self.digest = self.dataset["length"], self.dataset["digest"]
        self.stored = stored = sum(rows for _, rows in self.dataset["shards"])
        stop = stored if stop is None else stop
        if expected_length not in (None, self.length):
            raise InputError(f"{path}/dataset.json: length is {self.length}, not {expected_length}")
        if not 0 < stored <= MAX_ROWS:
            amount = f"{stored} rows, more than {MAX_ROWS}" if stored else "no rows"
            raise InputError(f"{path}/dataset.json: the dataset has {amount}")
        if not 0 <= start < stop <= stored:
            raise InputError(f"{path}: rows [{start}, {stop}) are empty or exceed the {stored} stored rows")
        if seed < 0:
            raise InputError(f"seed {seed} must not be negative")
        self._seed, self._start, self._count, self._shuffle = seed, start, stop - start, shuffle
        self._shards = RecordShards(path, self.dataset["shards"])
        self._corrupt_share = corrupt_share
        self.corrupt: set[int] = set()

    def __len__(self) -> int:
        return self._count

    def index(self, n: int) -> tuple[int, int]:
        index, epoch = shuffled(n, self._count, self._seed) if self._shuffle else (n % self._count, n // self._count)
        return self._start + index, epoch

    def read(self, row_id: int) -> Row:
        try:
            row = decode_row(self._shards.read(row_id))
            if len(row.ids) != self.length:
                raise CorruptRecord(f"{len(row.ids)} tokens instead of {self.length}")
            return row
        except InputError:
            raise
        except ValueError as error:
            if row_id not in self.corrupt:
                self.corrupt.add(row_id)
                self._report(f"{self._shards.place(row_id)} is corrupt ({error})")
        nothing = np.zeros(self.length, np.int32)
        return Row(nothing, nothing, nothing > 0, ())

    def _report(self, fault: str) -> None:
        count = len(self.corrupt)
        if count > self._corrupt_share * self.stored:
            if self._corrupt_share:
                share = f"config.data.corrupt_share={self._corrupt_share}"
                fault += f", the {count}th of {self.stored} rows: more than {share}"
            raise InputError(fault)
        print(f"{fault}; skipped, {count} of {self.stored} rows", file=sys.stderr, flush=True)


def prefetch(
    rows: Order,
    first_step: int,
    last_step: int,
    rows_per_step: int,
    offset: int = 0,
    which: slice | Sequence[int] = slice(None),
    depth: int = 2,
) -> Iterator[tuple[int, Batch]]:
    """Yields (step, rows.batch(step, …)) for first_step <= step < last_step and reads `depth` batches ahead.

    A background thread reads; its errors are raised here, at their place in the order. Closing the generator stops the
    thread.
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
