"""Digests of tensors: a sum over elements, so that the shards of an array add up to the whole on any mesh.

    digest(x) = (sum h1(i, x_i) mod 2^32, sum h2(i, x_i) mod 2^32)        written as 16 hex digits

x_i are the bits of element i, zero-extended to 32 bits (a 64-bit element counts as two), and i is its row-major index
in the whole tensor. Given i, h1 and h2 are bijections of the bits: an element that changes always changes both sums.

The index is a pair of 32-bit words: (row, place), `place` running over the trailing dimensions that hold at most 2^32
elements and `row` over the others (0 for any tensor below that size). It enters as key(place mod 2^15) and
salt(row, place div 2^15), so that on numpy one table of keys serves every chunk.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

_CHUNK_BITS = 15  # part of the definition; 2^15 elements keep the temporaries in the cache
_CHUNK = 1 << _CHUNK_BITS
_U16, _U15 = np.uint32(16), np.uint32(15)
# The finaliser of lowbias32 (Wellons), then odd constants of our own.
_C1, _C2, _C3, _C4 = (np.uint32(c) for c in (0x7FEB352D, 0x846CA68B, 0x9E3779B1, 0x2545F491))


def digest(array: np.ndarray) -> str:
    """16 hex digits for a numpy array of any shape, with elements of 1, 2, 4 or 8 bytes. Raises TypeError else."""
    return to_hex(_host_lanes(np.asarray(array)))


def _host_lanes(array: np.ndarray) -> np.ndarray:
    """`lanes` of a whole array, a chunk at a time."""
    words = _words(array, np)
    rows = words.reshape(math.prod(words.shape[: _leading(words.shape)]), -1)
    keys = _key_table()
    total = np.zeros(2, np.uint32)
    for row, values in enumerate(rows):
        salts = _salt(np.uint32([row]), np.arange(-(-values.size // _CHUNK), dtype=np.uint32))
        for salt, start in zip(salts, range(0, values.size, _CHUNK), strict=True):
            bits = values[start : start + _CHUNK].astype(np.uint32)
            total += _sums(bits, keys[: bits.size], salt, np)
    return total


def lanes(array, xp=jnp, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None):
    """The two sums of `array`, uint32 [2]; traceable under jit with xp=jax.numpy, also on sharded arrays.

    `array` may be a piece of a tensor: `shape` is then the shape of the whole and `start` the index of the piece's
    first element in it. The lanes of the pieces add up (mod 2^32) to those of the whole.
    """
    words = _words(array, xp)
    extra = (0,) * (words.ndim - array.ndim)
    start = (0,) * words.ndim if start is None else tuple(start) + extra
    shape = words.shape if shape is None else tuple(shape) + words.shape[array.ndim :]
    leading = _leading(shape)
    row = _linear_index(words.shape, start, shape, range(leading), xp)
    place = _linear_index(words.shape, start, shape, range(leading, words.ndim), xp)
    key = _finalise(place & np.uint32(_CHUNK - 1))
    return _sums(words.astype(xp.uint32), key, _salt(row, place >> _U15), xp)


def shard_lanes(array: jax.Array) -> np.ndarray:
    """The lanes of the shards that this process holds, uint32 [2]; over all processes they add up to the whole.

    Every replica but one is left out. Computed on the host: about a chunk of rows is held at a time.
    """
    total = np.zeros(2, np.uint32)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(part.start or 0 for part in shard.index)
            total += _piece_lanes(np.asarray(shard.data), start, array.shape)
    return total


def _piece_lanes(piece: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    if piece.ndim == 0:
        return lanes(piece, np, start, shape)
    total = np.zeros(2, np.uint32)
    rows = max(1, 4 * _CHUNK * len(piece) // max(piece.size, 1))
    for first in range(0, len(piece), rows):
        part = piece[first : first + rows]
        total += lanes(part, np, (start[0] + first, *start[1:]), shape)
    return total


def device_digests(
    arrays: Sequence[jax.Array], stacked: Sequence[bool] | None = None, on_host: bool | None = None
) -> list[list[str]]:
    """Digests of arrays where they live: [digest], or one for each index of the first axis where stacked.

    Every process must make the same calls. Each device sums its own shard, and the host adds: there is no collective
    on the devices, so that any number of arrays is in flight at once. on_host: numpy does it, which on CPU spares
    compiling (the default there); it needs the whole array in this process. Raises ValueError when the first axis of
    a stacked array is sharded over devices.
    """
    stacked = [False] * len(arrays) if stacked is None else stacked
    in_flight = [_start(array, each, on_host) for array, each in zip(arrays, stacked, strict=True)]
    sums = [_addressable_sum(partial, array.sharding) for partial, array in zip(in_flight, arrays, strict=True)]
    if jax.process_count() > 1 and sums:
        everywhere = multihost_utils.process_allgather(np.concatenate(sums))
        sums = np.split(everywhere.sum(0, dtype=np.uint32), np.cumsum([len(each) for each in sums])[:-1])
    return [[to_hex(pair) for pair in each] for each in sums]


def _start(array: jax.Array, stacked: bool, on_host: bool | None):
    """The lanes of each shard, [*mesh, n, 2] by the coordinates of its device; of the whole array, [n, 2]."""
    devices = array.sharding.device_set
    if on_host is None:
        on_host = array.is_fully_addressable and next(iter(devices)).platform == "cpu"
    if on_host:
        whole = np.asarray(array)
        return np.stack([_host_lanes(row) for row in whole] if stacked else [_host_lanes(whole)])
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
    """What this process adds to the digests, uint32 [n, 2]: every element is counted by one process, once."""
    if sharding.is_fully_addressable and jax.process_index() != 0:  # every process holds one like it
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


def _words(array, xp):
    """The bits as uint8, uint16 or uint32, same shape; [..., 2] of uint32 for 64-bit elements."""
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
    """How many leading dimensions make up `row`."""
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


@functools.cache
def _key_table() -> np.ndarray:
    return _finalise(np.arange(_CHUNK, dtype=np.uint32))


def _salt(row, chunk):
    return _finalise((chunk * _C3) ^ _finalise(row + _C4))


def _sums(bits, key, salt, xp):
    """The two sums; h2 continues from h1 with one more round, keyed again."""
    h1 = _finalise((bits + key) + salt)
    h2 = (h1 + key) * _C4
    h2 = h2 ^ (h2 >> _U15)
    return xp.stack([xp.sum(h1, dtype=xp.uint32), xp.sum(h2, dtype=xp.uint32)])
