"""Files of a checkpoint directory, without knowledge of models: tensors, digests, and the mark of completeness.

config.json       {"format": 1, "model": {...}, "lineage": {...}}; in a LoRA run also "lora": {...}
tokenizer/        the tokenizer's files, when it has one
params/           one tensor per layer and expert stack ("layers.007.query"), in Orbax's layout (OCDBT, zarr); in a
                  LoRA run those of the adapters
optimizer/        training only: the optimizer's state, in Orbax's layout
train_state.json  training only: the trainer's own values
digests.json      written last; a directory without it is incomplete
"""

import dataclasses
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from llada_jax.checkpoint.digest import digest, host_lanes, to_hex
from llada_jax.errors import InputError

FORMAT = 1
DIGESTS = "digests.json"
TENSOR_FOLDERS = ("params", "optimizer")
# Small enough that a host of a pod reads little beside its own shards, large enough for an object store.
CHUNK_BYTES = 16 * 2**20
# Read, converted and written at once.
SLAB_BYTES = 32 * 2**20
_OCDBT_NAMES = ("manifest.ocdbt", "d")


class DamagedError(InputError):
    """A file or tensor of a checkpoint is missing, cannot be read, or is not what was written."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """The record of one tensor in digests.json."""

    shape: tuple[int, ...]
    dtype: np.dtype
    digest: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Digests:
    """Contents of digests.json: sha256 of each small file, a TensorEntry per tensor of each folder, and its own sha256,
    which identifies the checkpoint.
    """

    files: dict[str, str]
    tensors: dict[str, dict[str, TensorEntry]]  # {"params": {"layers.007.query": TensorEntry}, "optimizer": {...}}
    sha256: str


def is_local(path: epath.Path) -> bool:
    """Whether a path is not on an object store, which cannot rename directories."""
    return "://" not in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """An absolute path; Orbax accepts no other."""
    path = os.fspath(path)
    return epath.Path(path if "://" in path else os.path.abspath(path))


def is_complete(directory: epath.Path) -> bool:
    return (directory / DIGESTS).exists()


def entry_of(array: np.ndarray, hex_digest: str | None = None) -> TensorEntry:
    return TensorEntry(tuple(array.shape), np.dtype(array.dtype), hex_digest or digest(array))


def sync(directory: epath.Path) -> None:
    """Flushes every file of a local directory to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())


# ---- digests.json and the small files


def write_json(path: epath.Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def finish(directory: epath.Path, tensors: dict[str, dict[str, TensorEntry]]) -> None:
    """Writes digests.json, which makes the directory a checkpoint; every other file must be there already."""
    files = {name: _sha256((directory / name).read_bytes()) for name in sorted(_small_files(directory))}
    described = {
        folder: {name: [list(e.shape), e.dtype.name, e.digest] for name, e in entries.items()}
        for folder, entries in tensors.items()
    }
    body = {"format": FORMAT, "files": files, "tensors": described}
    write_json(directory / DIGESTS, {"sha256": _sha256_of_json(body), **body})


def read_digests(directory: epath.Path) -> Digests:
    """Raises DamagedError when digests.json is missing or damaged, InputError when its format is not ours."""
    path = directory / DIGESTS
    try:
        body = json.loads(path.read_bytes())
        expected = body.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {directory}: incomplete, there is no {DIGESTS}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"checkpoint {directory}: {DIGESTS} is damaged ({_first_line(error)})") from error
    if _sha256_of_json(body) != expected:
        raise DamagedError(f"checkpoint {directory}: {DIGESTS} is damaged (its sha256 does not match)")
    if body["format"] != FORMAT:
        raise InputError(f"checkpoint {directory}: format {body['format']!r}, expected {FORMAT}")
    tensors = {
        folder: {
            name: TensorEntry(tuple(shape), jnp.dtype(dtype), hex_) for name, (shape, dtype, hex_) in entries.items()
        }
        for folder, entries in body["tensors"].items()
    }
    return Digests(body["files"], tensors, expected)


def read_file(directory: epath.Path, digests: Digests, name: str) -> bytes:
    """Bytes of a small file. Raises DamagedError naming the file if it is missing or its sha256 differs."""
    if name not in digests.files:
        raise DamagedError(f"checkpoint {directory}: there is no {name}")
    try:
        data = (directory / name).read_bytes()
    except OSError as error:
        raise DamagedError(f"checkpoint {directory}: {name} cannot be read ({_first_line(error)})") from error
    if (actual := _sha256(data)) != digests.files[name]:
        raise DamagedError(
            f"checkpoint {directory}: {name} is damaged (sha256 {actual[:16]}… expected {digests.files[name][:16]}…)"
        )
    return data


def _small_files(directory: epath.Path, prefix: str = "") -> list[str]:
    """Names, relative to the checkpoint, of all files except tensor data, which has its own digests."""
    names = []
    for path in directory.iterdir():
        if path.is_dir() and not (prefix and _is_ocdbt(path.name)):
            names += _small_files(path, f"{prefix}{path.name}/")
        elif not path.is_dir() and path.name != DIGESTS and not (prefix and _is_ocdbt(path.name)):
            names.append(prefix + path.name)
    return names


def _is_ocdbt(name: str) -> bool:
    return name in _OCDBT_NAMES or name.startswith("ocdbt.process_")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_of_json(value) -> str:
    return _sha256(json.dumps(value, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- tensors


class TensorWriter:
    """Writes the tensors of one folder slab by slab, in a layout that Orbax restores as a flat dict. Thread-safe.

    Orbax's own partial save keeps one database per call and reads all earlier ones on each call. A single database
    keeps the time per tensor constant.
    """

    def __init__(self, folder: epath.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._context = folder, ts.Context({"file_io_sync": False})  # sync() does it once

    def write(self, leaf, first: int, value: np.ndarray) -> ts.Future:
        """Starts writing `value` at index `first` along leaf.axis; `value` must not change until the future is done."""
        spec = {"driver": "zarr", "kvstore": _kvstore(self._folder, leaf.name), "metadata": {"compressor": None}}
        layout = ts.ChunkLayout(chunk_shape=_chunk_shape(leaf.shape, leaf.dtype.itemsize, leaf.axis))
        store = ts.open(
            spec, open=True, create=True, context=self._context, dtype=ts.dtype(leaf.dtype), shape=leaf.shape,
            chunk_layout=layout, write=True,
        ).result()  # fmt: skip
        if leaf.shape:
            index = (slice(None),) * leaf.axis + (slice(first, first + value.shape[leaf.axis]),)
            store = store[index]
        return store.write(value, can_reference_source_data_indefinitely=True)

    def close(self, names: Sequence[str]) -> None:
        """Writes the tree's metadata, as Orbax expects it."""
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        tree = {
            str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value} for name in names
        }
        write_json(
            self._folder / "_METADATA",
            {
                "tree_metadata": tree,
                "use_ocdbt": True,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            },
        )


class TensorReader:
    """Reads the tensors of one folder of a checkpoint, whole or in part."""

    def __init__(self, directory: epath.Path, folder: str, entries: dict[str, TensorEntry]):
        self.directory, self.folder, self.entries = directory, folder, entries
        # A cache for the database's inner nodes; what is read once need not pass through the system's.
        cache = {"total_bytes_limit": 64 * 2**20}
        self._context = ts.Context({"cache_pool": cache, "file_io_mode": {"mode": "direct"}})
        self._stores = {}

    def read(self, name: str, index: tuple[slice, ...] = (), verify: bool = False) -> np.ndarray:
        """Reads the tensor, or the part `index` of it. Raises DamagedError naming the tensor.

        verify: compares the digest (whole tensors only).
        """
        expected = self.entries.get(name)
        if expected is None:
            raise DamagedError(f'checkpoint {self.directory}: there is no tensor "{self._label(name)}"')
        store = self._attempt(name, lambda: self._open(name))
        actual = (tuple(store.shape), store.dtype.numpy_dtype)
        value = self._attempt(name, lambda: np.asarray((store[index] if index else store).read().result()))
        if actual != (expected.shape, expected.dtype):
            raise DamagedError(
                f'checkpoint {self.directory}: tensor "{self._label(name)}" is damaged: {actual[1]} {list(actual[0])}, '
                f"expected {expected.dtype} {list(expected.shape)}"
            )
        if verify:
            self.check(name, digest(value))
        return value

    def verify(self, name: str) -> None:
        """Reads the tensor slab by slab. Raises DamagedError naming it."""
        step, size = self.slab_length(name, 0), (*self.entries[name].shape, 1)[0]
        slabs = self.slabs()
        for first in range(0, max(size, 1), step):
            slabs.read(name, 0, first, min(first + step, size))

    def slabs(self) -> "VerifiedSlabs":
        return VerifiedSlabs(self)

    def slab_length(self, name: str, axis: int) -> int:
        """How many indices along `axis` make a slab of about SLAB_BYTES in whole chunks. Raises DamagedError."""
        expected = self.entries[name]
        if not expected.shape:
            return 1
        length = slab_length(expected.shape, expected.dtype.itemsize, axis)
        chunk = self._attempt(name, lambda: self._open(name).chunk_layout.read_chunk.shape[axis])
        return max(chunk, length // chunk * chunk)

    def check(self, name: str, actual: str) -> None:
        """Raises DamagedError naming the tensor unless `actual` is its digest."""
        if actual != (expected := self.entries[name].digest):
            raise DamagedError(
                f'checkpoint {self.directory}: tensor "{self._label(name)}" is damaged '
                f"(digest {actual} expected {expected})"
            )

    def _attempt(self, name: str, action: Callable):
        try:
            return action()
        except Exception as error:  # tensorstore raises plain ValueError and others
            raise DamagedError(
                f'checkpoint {self.directory}: tensor "{self._label(name)}" cannot be read ({_first_line(error)})'
            ) from error

    def _open(self, name: str):
        if name not in self._stores:
            spec = {"driver": "zarr", "kvstore": _kvstore(self.directory / self.folder, name)}
            self._stores[name] = ts.open(spec, open=True, read=True, context=self._context).result()
        return self._stores[name]

    def _label(self, name: str) -> str:
        return name if self.folder == "params" else f"{self.folder}/{name}"


class VerifiedSlabs:
    """Reads the tensors of a reader once, in slabs, in any order and from any thread. The call that reads the last slab
    of a tensor checks its digest.
    """

    def __init__(self, reader: TensorReader):
        self._reader, self._lock = reader, threading.Lock()
        self._sums: dict[str, tuple[int, np.ndarray]] = {}  # elements read, and their sums

    def read(self, name: str, axis: int, first: int, last: int) -> np.ndarray:
        """Indices first to last along `axis`. Raises DamagedError naming the tensor."""
        expected = self._reader.entries[name]
        index = (slice(None),) * axis + (slice(first, last),) if expected.shape else ()
        value = self._reader.read(name, index)
        lanes = host_lanes(value, tuple(part.start or 0 for part in index) + (0,) * (value.ndim - len(index)),
                           expected.shape)  # fmt: skip
        with self._lock:
            count, total = self._sums.get(name, (0, np.zeros(2, np.uint32)))
            self._sums[name] = count, total = count + value.size, total + lanes
        if count == math.prod(expected.shape):
            self._reader.check(name, to_hex(total))
        return value


def verify_tensors(directory: epath.Path, digests: Digests, folders: Iterable[str]) -> Iterable[str]:
    """Yields one line per damaged tensor; reads the tensors one by one."""
    for folder in folders:
        reader = TensorReader(directory, folder, digests.tensors.get(folder, {}))
        for name in reader.entries:
            try:
                reader.verify(name)
            except DamagedError as error:
                yield str(error)


def _kvstore(folder: epath.Path, name: str) -> dict:
    path = os.fspath(folder)
    base = f"{path}/" if "://" in path else {"driver": "file", "path": os.path.abspath(path) + "/"}
    return {"driver": "ocdbt", "base": base, "path": f"{name}/"}


def slab_length(shape: tuple[int, ...], itemsize: int, axis: int) -> int:
    """The number of indices along `axis`, a power of two, that hold about SLAB_BYTES."""
    size = shape[axis] if shape else 1
    each = math.prod(shape) // max(size, 1) * itemsize
    return 1 << max(0, (SLAB_BYTES // max(each, 1)).bit_length() - 1)


def holds_experts(shape: Sequence[int]) -> bool:
    """Whether a layer's tensor of this shape is a stack of experts, whose chunks are cut along the experts."""
    return len(shape) == 3


def _chunk_shape(shape: tuple[int, ...], itemsize: int, axis: int) -> list[int]:
    """Halves a slab until a chunk has at most CHUNK_BYTES. A stack of experts is halved along the experts, which go to
    different devices; any other tensor along its longest side, as a mesh may split any axis. No chunk spans two slabs.
    """
    chunk = [max(1, size) for size in shape]
    if chunk:
        chunk[axis] = min(chunk[axis], slab_length(shape, itemsize, axis))
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        side = 0 if holds_experts(chunk) and chunk[0] > 1 else chunk.index(max(chunk))
        chunk[side] = -(-chunk[side] // 2)
    return chunk
