"""Digests of tensors: sums over elements, so that the shards of an array add up to the whole on any mesh.

    digest(x) = (sum h1(i, x_i) mod 2^32, sum h2(i, x_i) mod 2^32)        written as 16 hex digits

x_i are the bits of element i, zero-extended to 32 bits (a 64-bit element counts as two), and i is its row-major index
in the whole tensor. Given i, h1 and h2 are bijections of the bits: an element that changes always changes both sums.

The index is a pair of 32-bit words (row, place): `place` runs over the trailing dimensions with at most 2^32 elements,
and `row` over the others (0 for any tensor below that size). It enters as key(place mod 2^15) and
salt(row, place div 2^15).
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

_CHUNK_BITS = 15  # part of the definition
_CHUNK = 1 << _CHUNK_BITS
# Elements that numpy sums at once, so that temporaries stay in the cache; rows and minimum width of a compiled call.
_NUMPY_ELEMENTS, _SCANNED_ROWS, _SCANNED_WIDTH = 1 << 15, (512, 64), 1 << 12
_U16, _U15 = np.uint32(16), np.uint32(15)
# The finaliser of lowbias32 (Wellons), then odd constants of our own.
_C1, _C2, _C3, _C4 = (np.uint32(c) for c in (0x7FEB352D, 0x846CA68B, 0x9E3779B1, 0x2545F491))


def digest(array: np.ndarray) -> str:
    """16 hex digits for a numpy array of any shape with elements of 1, 2, 4 or 8 bytes; otherwise raises TypeError."""
    return to_hex(host_lanes(np.asarray(array)))


def lanes(array, xp=jnp, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None):
    """The two sums of `array`, uint32 [2]. With xp=jax.numpy traceable under jit, also on sharded arrays.

    `array` may be a piece of a tensor: `shape` is then the shape of the whole, and `start` the index of the piece's
    first element. The lanes of the pieces add up (mod 2^32) to those of the whole.
    """
    words, start, shape = _placed(array, xp, start, shape)
    leading = _leading(shape)
    row = _linear_index(words.shape, start, shape, range(leading), xp)
    place = _linear_index(words.shape, start, shape, range(leading, words.ndim), xp)
    return _sums(words.astype(xp.uint32), row, place, xp)


def host_lanes(
    piece: np.ndarray, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """`lanes` of a numpy array in host memory, uint32 [2], without a copy of its size.

    A fused loop on the CPU device sums most of it, at some GB/s per core and without Python's lock.
    """
    words, start, shape = _placed(piece, np, start, shape)
    leading = _leading(shape)
    total = np.zeros(2, np.uint32)
    for index in np.ndindex(words.shape[:leading]):
        row = _linear_index((1,) * leading, np.add(start[:leading], index), shape[:leading], range(leading), np)
        for runs, places in _runs(words[index], start[leading:], shape[leading:]):
            total += _sum_runs(runs, row.reshape(()), places)
    return total


def _placed(array, xp, start, shape):
    """(words, start, shape) of a piece; without a shape, of the whole."""
    words = _words(array, xp)
    extra = words.shape[array.ndim :]
    if shape is None:
        return words, (0,) * words.ndim, words.shape
    return words, (*start, *(0 for _ in extra)), (*shape, *extra)


def _runs(words: np.ndarray, start, shape) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (runs [n, width], place of each run's first element [n]): parts that are contiguous in the whole."""
    if not words.size:
        return
    split = words.ndim
    while split and words.shape[split:] == tuple(shape[split:]):
        split -= 1
    outer = words.shape[:split]
    places = _linear_index(outer + (1,) * (words.ndim - split), start, shape, range(words.ndim), np).reshape(-1)
    if len(places) > 1:
        yield words.reshape(len(places), -1), places
        return
    flat, whole = words.reshape(-1), words.size // _CHUNK * _CHUNK
    yield flat[:whole].reshape(-1, _CHUNK), places + np.arange(0, whole, _CHUNK, dtype=np.uint32)
    yield flat[None, whole:], places + np.uint32(whole)


def _sum_runs(runs: np.ndarray, row: np.ndarray, places: np.ndarray) -> np.ndarray:
    n, width = runs.shape
    total = np.zeros(2, np.uint32)
    scanned, device = 0, cpu_device() if width >= _SCANNED_WIDTH else None
    for count in () if device is None else _SCANNED_ROWS:
        while n - scanned >= count:
            rows = slice(scanned, scanned + count)
            total += jax.device_get(_scan_sums(*jax.device_put((runs[rows], row, places[rows]), device)))
            scanned += count
    step = max(1, _NUMPY_ELEMENTS // max(width, 1))
    for first in range(scanned, n, step):
        for column in range(0, width, _NUMPY_ELEMENTS):
            bits = runs[first : first + step, column : column + _NUMPY_ELEMENTS].astype(np.uint32)
            steps = np.arange(column, column + bits.shape[1], dtype=np.uint32)
            place = places[first : first + step, None] + steps[None]
            total += _sums(bits, row[None, None], place, np)
    return total


@jax.jit
def _scan_sums(runs, row, places):
    """The sums, uint32 [2], of runs [n, width] uint with row [] and places [n] uint32."""
    steps = jax.lax.iota(jnp.uint32, runs.shape[1])

    def add(total, one):
        run, place = one
        return total + _sums(run.astype(jnp.uint32), row[None], place[None] + steps, jnp), None

    return jax.lax.scan(add, jnp.zeros(2, jnp.uint32), (runs, places))[0]


@functools.cache
def cpu_device() -> jax.Device | None:
    """The CPU device; None if JAX has none (JAX_PLATFORMS=tpu), and numpy does everything."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def shard_lanes(array: jax.Array) -> np.ndarray:
    """The lanes of this process's shards, uint32 [2]; over all processes they add up to those of the whole.

    Counts one replica of each shard. Computed on the host.
    """
    total = np.zeros(2, np.uint32)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(part.start or 0 for part in shard.index)
            total += host_lanes(np.asarray(shard.data), start, array.shape)
    return total


def device_digests(
    arrays: Sequence[jax.Array], stacked: Sequence[bool] | None = None, on_host: bool | None = None
) -> list[list[str]]:
    """Digests of arrays on their devices: per array [digest], or one digest per index of the first axis if stacked.

    Every process must make the same calls. Each device sums its own shard and the host adds them. Without collectives
    on the devices, any number of arrays can be in flight at once. on_host: computed as by host_lanes, which needs the
    whole array in this process and, on CPU, avoids compiling (the default there). Raises ValueError if the first axis
    of a stacked array is sharded over devices.
    """
    stacked = [False] * len(arrays) if stacked is None else stacked
    in_flight = [_start(array, each, on_host) for array, each in zip(arrays, stacked, strict=True)]
    sums = [_addressable_sum(partial, array.sharding) for partial, array in zip(in_flight, arrays, strict=True)]
    if jax.process_count() > 1 and sums:
        everywhere = multihost_utils.process_allgather(np.concatenate(sums))
        sums = np.split(everywhere.sum(0, dtype=np.uint32), np.cumsum([len(each) for each in sums])[:-1])
    return [[to_hex(pair) for pair in each] for each in sums]


def _start(array: jax.Array, stacked: bool, on_host: bool | None):
    """The lanes per shard, [*mesh, n, 2] by device coordinates; or of the whole array, [n, 2]."""
    devices = array.sharding.device_set
    if on_host is None:
        on_host = array.is_fully_addressable and next(iter(devices)).platform == "cpu"
    if on_host:
        whole = np.asarray(array)
        return np.stack([host_lanes(row) for row in whole] if stacked else [host_lanes(whole)])
    if isinstance(array.sharding, NamedSharding):
        return _shard_function(array.sharding, array.ndim, stacked)(array)
    return _whole_function(stacked)(array)


@functools.cache
def _whole_function(stacked: bool):
    return jax.jit(lambda x: jax.vmap(lanes)(x) if stacked else lanes(x).reshape(1, 2))


@functools.cache
def _shard_function(sharding: NamedSharding, ndim: int, stacked: bool):
    mesh = sharding.mesh
    sides = _axes_of_dims(sharding, ndim)
    if stacked and sides[0]:
        raise ValueError("digest: the axis of the layers cannot be sharded")

    def of_shard(x):
        start = [jax.lax.axis_index(axes).astype(jnp.uint32) * np.uint32(n) if axes else 0
                 for axes, n in zip(sides, x.shape, strict=True)]  # fmt: skip
        shape = [n * math.prod(mesh.shape[axis] for axis in axes) for axes, n in zip(sides, x.shape, strict=True)]
        if stacked:
            pairs = jax.vmap(lambda row: lanes(row, jnp, start[1:], shape[1:]))(x)
        else:
            pairs = lanes(x, jnp, start, shape).reshape(1, 2)
        return pairs.reshape((1,) * len(mesh.axis_names) + pairs.shape)

    by_device = PartitionSpec(*mesh.axis_names)
    return jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=sharding.spec, out_specs=by_device, check_vma=False))


def _axes_of_dims(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    entries = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]


def _addressable_sum(partial, sharding) -> np.ndarray:
    """This process's part of the digests, uint32 [n, 2]; every element is counted once, by one process."""
    if sharding.is_fully_addressable and jax.process_index() != 0:  # every process has the same array
        return np.zeros(partial.shape[-2:], np.uint32)
    if partial.ndim == 2:
        return np.asarray(partial)
    mesh = sharding.mesh
    used = {axis for axes in _axes_of_dims(sharding, len(sharding.spec)) for axis in axes}
    total = np.zeros(partial.shape[-2:], np.uint32)
    for shard in partial.addressable_shards:
        coordinates = dict(zip(mesh.axis_names, (part.start or 0 for part in shard.index), strict=False))
        if not any(coordinates[axis] for axis in mesh.axis_names if axis not in used):
            total += np.asarray(shard.data).reshape(total.shape)
    return total


def to_hex(pair) -> str:
    """Two uint32 -> 16 hex digits."""
    first, second = np.asarray(pair).tolist()
    return f"{first:08x}{second:08x}"


def from_hex(text: str) -> np.ndarray:
    """Inverse of to_hex."""
    return np.array([int(text[:8], 16), int(text[8:], 16)], np.uint32)


def _words(array, xp):
    """The bits as uint8, uint16 or uint32 of the same shape; uint32 [..., 2] for 64-bit elements."""
    size = np.dtype(array.dtype).itemsize
    # Sub-byte types report one byte but have no byte layout that numpy and XLA share.
    if size not in (1, 2, 4, 8) or "int4" in str(array.dtype) or "int2" in str(array.dtype):
        raise TypeError(f"no digest for elements of type {array.dtype}")
    unsigned = np.dtype(f"uint{8 * min(size, 4)}")
    if xp is np:
        words = np.ascontiguousarray(array).reshape((*array.shape, 1)).view(unsigned)
        return words if size == 8 else words.reshape(array.shape)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(array, unsigned)


def _leading(shape: tuple[int, ...]) -> int:
    """The number of leading dimensions that form `row`."""
    return next(n for n in range(len(shape) + 1) if math.prod(shape[n:]) <= 2**32)


def _linear_index(piece, start, shape, dims, xp):
    """Row-major index over `dims` of the whole, as uint32 broadcastable against the piece."""
    index = xp.zeros((1,) * len(piece), xp.uint32)
    for dim in dims:
        extent = [1] * len(piece)
        extent[dim] = piece[dim]
        steps = xp.arange(piece[dim], dtype=xp.uint32).reshape(extent)
        steps = steps + xp.asarray(start[dim], dtype=xp.uint32)
        index = index + steps * np.uint32(math.prod(shape[dim + 1 : dims.stop]) % 2**32)
    return index


def _finalise(x):
    x = (x ^ (x >> _U16)) * _C1
    x = (x ^ (x >> _U15)) * _C2
    return x ^ (x >> _U16)


def _salt(row, chunk):
    return _finalise((chunk * _C3) ^ _finalise(row + _C4))


def _sums(bits, row, place, xp):
    """The two sums; `row` and `place` broadcast against `bits`. h2 continues from h1 and is keyed again."""
    key = _finalise(place & np.uint32(_CHUNK - 1))
    h1 = _finalise((bits + key) + _salt(row, place >> _U15))
    h2 = (h1 + key) * _C4
    h2 = h2 ^ (h2 >> _U15)
    return xp.stack([xp.sum(h1, dtype=xp.uint32), xp.sum(h2, dtype=xp.uint32)])
