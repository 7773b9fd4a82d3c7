"""LoRA runs: which adapters a config asks for, and the weights of a checkpoint that holds adapters only.

A step of a LoRA run holds A and B of each adapted weight, their optimizer state, and in config.json the directory of
the base and the sha256 of its digests.json. Whoever asks for the weights of such a step gets the base's tensors with
the low-rank terms added (model/lora.py), in the base's dtype.
"""

import functools

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax.errors import InputError
from llada_jax.model import lora, parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.training import checkpoint_arrays as arrays
from llada_jax.training import checkpoint_files as files


def open_lora(config: ConfigDict, model: ModelConfig, base: epath.Path) -> Lora:
    """The adapters that config.lora asks for on the checkpoint in directory `base`.

    Raises InputError naming a target that is no dense projection of the model.
    """
    targets, known = tuple(config.lora.targets), parameters.adaptable(model)
    if not targets:
        raise InputError(f"config.lora.targets=(), expected some of {', '.join(known)}")
    for name in targets:
        if name not in known:
            raise InputError(f"config.lora.targets: {name!r} takes no adapter, expected some of {', '.join(known)}")
    identity = files.read_digests(base).sha256
    return Lora(model, config.lora.rank, config.lora.alpha, targets, str(files.absolute(base)), identity)


def describe(adapters: Lora) -> str:
    train = parameters.count(adapters)
    total = train + parameters.count(adapters.model)
    targets = ", ".join(adapters.targets)
    return f"LoRA rank {adapters.rank} on {targets}: {train:,} of {total:,} parameters train"


def base_of(adapters: Lora, directory: epath.Path) -> epath.Path:
    """Directory of the base of the step in `directory`. Raises InputError when it is gone or another one."""
    base = epath.Path(adapters.base)
    try:
        found = files.read_digests(base).sha256
    except files.DamagedError as error:
        raise InputError(f"checkpoint {directory}: the base of its adapters cannot be read: {error}") from error
    if found != adapters.base_digest:
        raise InputError(
            f"checkpoint {directory}: the base of its adapters, {base}, has changed since (sha256 {found[:16]}… "
            f"expected {adapters.base_digest[:16]}…)"
        )
    return base


class MergedReader:
    """Reads the tensors of a LoRA step as those of a whole model, like a checkpoint_files.TensorReader."""

    def __init__(self, lora: Lora, base: "files.TensorReader | MergedReader", adapters: files.TensorReader):
        self.lora, self.base, self.adapters = lora, base, adapters
        self.directory, self.entries = adapters.directory, base.entries

    def read(self, name: str, verify: bool = False) -> np.ndarray:
        """W + alpha / rank * A B, or W where there is no adapter. Raises DamagedError naming the tensor."""
        weight = self.base.read(name, verify=verify)
        a, b = lora.adapter_names(name)
        if a not in self.adapters.entries:
            return weight
        low_rank = (self.adapters.read(each, verify=verify) for each in (a, b))
        return lora.merge(weight, *low_rank, self.lora.scale, np)

    def slabs(self) -> "MergedSlabs":
        return MergedSlabs(self)

    def slab_length(self, name: str, axis: int) -> int:
        return self.base.slab_length(name, axis)

    def read_sharded(self, wanted, verify: bool = True) -> list[jax.Array]:
        """As arrays.read_sharded: the base's parts are read where they lie and merged on the devices."""
        merged = read_sharded(self.base, wanted, verify)
        for i, (names, where) in enumerate(wanted):
            a, b = ([lora.adapter_names(name)[n] for name in _each(names)] for n in range(2))
            if a[0] in self.adapters.entries:
                whole = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
                low_rank = arrays.read_sharded(self.adapters, [(tuple(a), whole), (tuple(b), whole)], verify)
                merged[i] = self._merge_stack(merged[i], *low_rank)
        return merged

    def _merge_stack(self, weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        def merge(weights, a, b):
            return jax.vmap(lambda *one: lora.merge(*one, self.lora.scale))(weights, a, b)

        with jax.default_matmul_precision("highest"):
            return jax.jit(merge, out_shardings=weights.sharding, donate_argnums=0)(weights, a, b)


class MergedSlabs:
    """As checkpoint_files.VerifiedSlabs. An adapted weight is cut along its first output axis, as its B is along 1."""

    def __init__(self, reader: MergedReader):
        self._reader, self._base = reader, reader.base.slabs()
        self._adapter = functools.cache(functools.partial(reader.adapters.read, verify=True))

    def read(self, name: str, axis: int, first: int, last: int) -> np.ndarray:
        weight = self._base.read(name, axis, first, last)
        a, b = lora.adapter_names(name)
        if a not in self._reader.adapters.entries:
            return weight
        return lora.merge(weight, self._adapter(a), self._adapter(b)[:, first:last], self._reader.lora.scale, np)


def read_sharded(reader: files.TensorReader | MergedReader, wanted, verify: bool = True) -> list[jax.Array]:
    """arrays.read_sharded for either reader."""
    if isinstance(reader, MergedReader):
        return reader.read_sharded(wanted, verify)
    return arrays.read_sharded(reader, wanted, verify)


def _each(names: arrays.Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
