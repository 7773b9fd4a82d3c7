"""Reads the tensors of a checkpoint as arrays: stacked for scan, on the default device or sharded over a mesh."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.checkpoint import digest
from llada_jax.checkpoint.files import DamagedError, TensorReader
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora

Names = str | tuple[str, ...]  # one tensor, or the tensors that are stacked along a new first axis

_READERS = min(4, os.cpu_count() or 1)  # tensors read and digested at once


def stacked_names(config: ModelConfig | Lora) -> dict:
    """Tree of Names with the structure of parameters.abstract; map over it with is_leaf=is_names."""
    groups = config.layer_groups

    def of(name, node):
        if name not in groups:
            return parameters.leaf_name(name)
        return {field: tuple(parameters.leaf_name(field, layer) for layer in groups[name]) for field in node}

    return {name: of(name, node) for name, node in parameters.declare(config).items()}


def is_names(x) -> bool:
    return isinstance(x, (str, tuple))


def read_whole(reader: TensorReader, names: Names, dtype=None, verify: bool = True) -> jax.Array:
    """The tensor, or stack of tensors, on the default device. Raises DamagedError naming the tensor."""
    if isinstance(names, str):
        return jnp.asarray(_cast(reader.read(names, verify=verify), dtype))
    shape, stored = stack_of(reader, names)
    stack = np.empty(shape, stored if dtype is None else dtype)

    def fill(row: int, name: str) -> None:
        stack[row] = _cast(reader.read(name, verify=verify), dtype)

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(fill, range(len(names)), names):
            pass
    return jnp.asarray(stack)


def read_sharded(
    reader: TensorReader, layouts: Sequence[tuple[Names, jax.sharding.Sharding]], verify: bool = True
) -> list[jax.Array]:
    """Reads each tensor or stack with its sharding; each process reads the parts of its own devices.

    verify: digests are computed on the devices. Every process must make the same call. Raises DamagedError on every
    process if one of them raises it.
    """
    elsewhere = f"checkpoint {reader.directory}: damaged, as another process found"
    loaded, error = [], None
    try:
        loaded = [_read_sharded(reader, names, sharding) for names, sharding in layouts]
    except DamagedError as caught:
        error = caught
    agree(error, elsewhere)
    if verify:
        computed = digest.device_digests(loaded, [not isinstance(names, str) for names, _ in layouts])
        for (names, _), digests in zip(layouts, computed, strict=True):
            for name, each in zip((names,) if isinstance(names, str) else names, digests, strict=True):
                reader.check(name, each)  # the same on every process
    return loaded


def agree(error: Exception | None, elsewhere: str) -> None:
    """Raises `error`, or DamagedError(elsewhere) if another process has an error. A barrier for all processes."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.array(failed))))
    if error is not None:
        raise error
    if failed:
        raise DamagedError(elsewhere)


def cast_sharded(array: jax.Array, dtype) -> jax.Array:
    if dtype is None or array.dtype == dtype:
        return array
    return jax.jit(lambda x: x.astype(dtype), out_shardings=array.sharding)(array)


def stack_of(reader: TensorReader, names: Names) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a tensor or stack. Raises DamagedError if a tensor is missing or does not fit the stack."""
    one = isinstance(names, str)
    entries = []
    for name in (names,) if one else names:
        if name not in reader.entries:
            raise DamagedError(f'checkpoint {reader.directory}: there is no tensor "{name}"')
        entries.append(reader.entries[name])
        if (entries[-1].shape, entries[-1].dtype) != (entries[0].shape, entries[0].dtype):
            raise DamagedError(
                f'checkpoint {reader.directory}: tensor "{name}" differs in shape or type from {names[0]}'
            )
    return (entries[0].shape if one else (len(names), *entries[0].shape)), entries[0].dtype


def _read_sharded(reader: TensorReader, names: Names, sharding) -> jax.Array:
    shape, _ = stack_of(reader, names)
    parts = {}  # replicas on this process ask for the same part

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            if isinstance(names, str):
                parts[key] = reader.read(names, index)
            else:
                parts[key] = np.stack([reader.read(name, index[1:]) for name in names[index[0]]])
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _cast(array: np.ndarray, dtype) -> np.ndarray:
    return array if dtype is None else array.astype(dtype, copy=False)
