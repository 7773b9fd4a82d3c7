"""Weights of LoRA steps: checkpoints that hold adapters only.

A LoRA step holds A and B of each adapted weight and their optimizer state. Its config.json names the directory of the
base and the sha256 of the base's digests.json. Reading its weights returns the base's tensors with the low-rank terms
added (model/lora.py), in float32: in a bfloat16 base, most of a small update is below half a unit in the last place and
would be lost. Weights that must stay narrower keep the adapters beside them, unmerged, as in training (`attached`).
That costs no memory; the adaptable weights of mini (16B), 0.3 B, would take 0.6 GB more in float32. Merged weights are
rounded once, when they are written (`Rounding`).
"""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.checkpoint import arrays, files
from llada_jax.errors import InputError
from llada_jax.model import lora
from llada_jax.model.lora import Lora


def base_of(adapters: Lora, directory: epath.Path) -> epath.Path:
    """Directory of the base of the step in `directory`. Raises InputError if it is missing or has changed."""
    base = epath.Path(adapters.base)
    try:
        digest = files.read_digests(base).sha256
    except files.DamagedError as error:
        raise InputError(f"checkpoint {directory}: the base of its adapters cannot be read: {error}") from error
    if digest != adapters.base_digest:
        raise InputError(
            f"checkpoint {directory}: the base of its adapters, {base}, has changed since (sha256 {digest[:16]}… "
            f"expected {adapters.base_digest[:16]}…)"
        )
    return base


class MergedReader:
    """Reads the tensors of a LoRA step as those of a whole model, like a files.TensorReader.

    Attributes: `entries` of the tensors as read (adapted ones are float32); `stored`, entries of the innermost base.
    """

    def __init__(self, lora: Lora, base: "files.TensorReader | MergedReader", adapters: files.TensorReader):
        self.lora, self.base, self.adapters = lora, base, adapters
        self.directory, self.stored = adapters.directory, stored_entries(base)
        self.entries = {
            name: dataclasses.replace(entry, dtype=np.dtype("float32")) if self.adapts(name) else entry
            for name, entry in base.entries.items()
        }

    def adapts(self, name: str) -> bool:
        return lora.adapter_names(name)[0] in self.adapters.entries

    def read(self, name: str, verify: bool = False) -> np.ndarray:
        """W + alpha / rank * A B in float32, or W without an adapter. Raises DamagedError naming the tensor."""
        weight = self.base.read(name, verify=verify)
        if not self.adapts(name):
            return weight
        low_rank = (self.adapters.read(each, verify=verify) for each in lora.adapter_names(name))
        return lora.merge(weight.astype(np.float32), *low_rank, self.lora.scale, np)

    def slabs(self) -> "MergedSlabs":
        return MergedSlabs(self)

    def slab_length(self, name: str, axis: int) -> int:
        return self.base.slab_length(name, axis)

    def read_sharded(self, layouts, verify: bool = True) -> list[jax.Array]:
        """As arrays.read_sharded: each process reads its parts of the base, and the devices merge them."""
        merged = read_sharded(self.base, layouts, verify)
        for i, (names, sharding) in enumerate(layouts):
            if self.adapts(_each(names)[0]):
                merged[i] = self._merge_stack(merged[i], *self.read_stacks(names, sharding, verify))
        return merged

    def read_stacks(self, names: arrays.Names, sharding, verify: bool = True) -> list[jax.Array]:
        """A and B of a stack of weights, float32 [layers, ...], replicated over the devices of the weights' `sharding`
        (None: the default device).
        """
        stacks = list(zip(*(lora.adapter_names(name) for name in _each(names)), strict=True))
        if sharding is None:
            return [arrays.read_whole(self.adapters, each, None, verify) for each in stacks]
        whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
        return arrays.read_sharded(self.adapters, [(each, whole) for each in stacks], verify)

    def _merge_stack(self, weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        def merge(weights, a, b):
            weights = weights.astype(np.float32)
            return jax.vmap(lambda *one: lora.merge(*one, self.lora.scale, jnp))(weights, a, b)

        donated = 0 if weights.dtype == np.float32 else ()
        with jax.default_matmul_precision("highest"):
            return jax.jit(merge, out_shardings=weights.sharding, donate_argnums=donated)(weights, a, b)


class MergedSlabs:
    """As files.VerifiedSlabs. An adapted weight is cut along its first output axis, which is axis 1 of its B."""

    def __init__(self, reader: MergedReader):
        self._reader, self._base = reader, reader.base.slabs()
        self._adapter = functools.cache(functools.partial(reader.adapters.read, verify=True))

    def read(self, name: str, axis: int, first: int, last: int) -> np.ndarray:
        weight = self._base.read(name, axis, first, last)
        if not self._reader.adapts(name):
            return weight
        return lora.merge(weight.astype(np.float32), *self._pair(name, first, last), self._reader.lora.scale, np)

    def update(self, name: str, first: int, last: int) -> np.ndarray | None:
        """What `read` adds to the base without adapters, float32; None if nothing."""
        below = self._base.update(name, first, last) if isinstance(self._base, MergedSlabs) else None
        if not self._reader.adapts(name):
            return below
        a, b = self._pair(name, first, last)
        zero = np.zeros((*a.shape[:-1], *b.shape[1:]), np.float32) if below is None else below
        return lora.merge(zero, a, b, self._reader.lora.scale, np)

    def _pair(self, name: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = lora.adapter_names(name)
        return self._adapter(a), self._adapter(b)[:, first:last]


class Rounding:
    """Measures how much of the adapters' update is lost when merged weights are rounded. Thread-safe."""

    def __init__(self):
        self._lock, self._lost, self._whole = threading.Lock(), 0.0, 0.0

    def round(self, exact: np.ndarray, update: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
        """Returns `exact` in `dtype`. update: from update_of."""
        rounded = exact.astype(dtype, copy=False)
        if update is not None:
            base = (exact - update).astype(dtype)
            lost = rounded.astype(np.float32) - base.astype(np.float32) - update
            with self._lock:
                self._lost += float(np.square(lost, dtype=np.float64).sum())
                self._whole += float(np.square(update, dtype=np.float64).sum())
        return rounded

    def report(self) -> None:
        """Prints the lost share of the update's root mean square, if there was an update."""
        if self._whole:
            share = np.sqrt(self._lost / self._whole)
            print(f"rounding lost {share:.1%} of the adapters' update; --dtype=float32 keeps it", flush=True)


def update_of(
    slabs: "files.VerifiedSlabs | MergedSlabs", name: str, first: int, last: int, to: np.dtype
) -> np.ndarray | None:
    """MergedSlabs.update for the slabs of either reader; None if float32 is written, since nothing is rounded."""
    return slabs.update(name, first, last) if isinstance(slabs, MergedSlabs) and to != np.float32 else None


def stored_entries(reader: "files.TensorReader | MergedReader") -> dict[str, files.TensorEntry]:
    """The entries of the tensors as stored; a LoRA step's are stored in its base."""
    return reader.stored if isinstance(reader, MergedReader) else reader.entries


def levels(reader: "files.TensorReader | MergedReader") -> tuple[files.TensorReader, list[MergedReader]]:
    """Returns (the base without adapters, the LoRA steps on it, in the order they were trained)."""
    above = []
    while isinstance(reader, MergedReader):
        above.insert(0, reader)
        reader = reader.base
    return reader, above


def attached(reader: MergedReader, params: dict, names: dict, shardings: dict | None, verify: bool) -> dict:
    """Returns `params`, the innermost base of `reader`, with the adapters of all its LoRA steps beside the weights.

    names: arrays.stacked_names of the model. shardings: a tree as `params`; None: the default device.
    """
    for step in levels(reader)[1]:
        adapters = {}
        for group in (group for group in names if isinstance(names[group], dict)):
            adapters[group] = {}
            for name, stack in names[group].items():
                if step.adapts(stack[0]):
                    pair = step.read_stacks(stack, shardings and shardings[group][name], verify)
                    adapters[group] |= zip(lora.adapter_names(name), pair, strict=True)
        params = lora.attach(params, adapters, step.lora)
    return params


def read_sharded(reader: files.TensorReader | MergedReader, layouts, verify: bool = True) -> list[jax.Array]:
    """arrays.read_sharded for either reader."""
    if isinstance(reader, MergedReader):
        return reader.read_sharded(layouts, verify)
    return arrays.read_sharded(reader, layouts, verify)


def _each(names: arrays.Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
