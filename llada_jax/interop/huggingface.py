"""Tensors of a Hugging Face checkpoint become leaves of our parameters, read slab by slab.

Names, shapes and transforms come from `parameters.leaves(config)`. `plan_leaves` checks every name and shape from the
files' headers; after that, only a disk error can stop the reading.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
import threading
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath

from llada_jax.checkpoint import digest, files
from llada_jax.checkpoint.stream import Leaf, split_axis, target_dtype
from llada_jax.errors import InputError
from llada_jax.folder import file_in
from llada_jax.interop import direct
from llada_jax.interop.stored_tensor import DTYPES, StoredTensor
from llada_jax.interop.torch_files import open_torch
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import Parameter

_NAMES_SHOWN = 3


def parse_dtype(name: str) -> np.dtype:
    """The dtype that --dtype names. Raises InputError if weights cannot be converted to it."""
    known = {dtype.name: dtype for dtype in (DTYPES["F32"], DTYPES["BF16"])}
    if name not in known:
        raise InputError(f"--dtype={name}, expected one of {', '.join(known)}")
    return known[name]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One leaf to write and the tensors it is made of: one, or one per expert."""

    name: str
    parameter: Parameter
    sources: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.sources[0].dtype


# --- files ---------------------------------------------------------------------------------------------------------


def find_weights(folder: epath.Path) -> tuple[list[epath.Path], dict[str, epath.Path]]:
    """(weight files in order, {tensor name: shard} of the index or {}): one file, or the shards of an index.

    Raises InputError naming a file that is missing, or an index entry or link that leads out of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = file_in(folder, name), file_in(folder, f"{name}.index.json")
        if single.is_file():
            return [single], {}
        if index.is_file():
            shards = _read_index(index)
            return list(dict.fromkeys(shards.values())), shards
    raise InputError(f"{folder}: no model.safetensors, model.safetensors.index.json, or pytorch_model.bin")


def open_tensors(folder: epath.Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, from the headers only.

    Raises InputError naming the file that is missing, truncated or inconsistent with the index.
    """
    tensors: dict[str, StoredTensor] = {}
    paths, shards = find_weights(folder)
    for path in paths:
        in_file = open_torch(path) if path.suffix == ".bin" else open_safetensors(path)
        if twice := sorted(set(in_file) & set(tensors)):
            raise InputError(f"{path}: tensor {twice[0]} is also in {tensors[twice[0]].file}")
        if absent := sorted(name for name, shard in shards.items() if shard == path and name not in in_file):
            raise InputError(f"{path}: tensor {absent[0]} is missing, which the index says is here")
        tensors |= in_file
    return _without_wrappers(tensors)


def _without_wrappers(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without the name prefix that module wrappers (DDP, torch.compile) add."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_wrappers({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _read_index(index: epath.Path) -> dict[str, epath.Path]:
    """{tensor name: shard}."""
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_once)["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from error
    if not named:
        raise InputError(f"{index}: lists no tensors")
    shards = {}
    for file in dict.fromkeys(named.values()):
        shards[file] = file_in(index.parent, file, str(index))
        if not shards[file].is_file():
            raise InputError(f"{shards[file]}: missing shard, named in {index.name}")
    return {name: shards[file] for name, file in named.items()}


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict. Raises ValueError if a key appears twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return values


def open_safetensors(path: epath.Path) -> dict[str, StoredTensor]:
    """Tensors of one file. Raises InputError if it is truncated, malformed or holds another dtype than F32/F16/BF16."""
    header, start = _read_header(path)
    size = path.stat().length
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: malformed header entry of {name}") from error
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        if min(shape, default=0) < 0 or last - first != math.prod(shape) * DTYPES[dtype].itemsize or first < 0:
            raise InputError(f"{path}: {name} has {last - first} bytes, not those of shape {list(shape)}")
        if start + last > size:
            raise InputError(f"{path}: truncated, {size} bytes where its header needs at least {start + last}")
        tensors[name] = _stored(path, DTYPES[dtype], shape, start + first)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise InputError(f"{path}: {name} begins at byte {first} of the data, expected {end}")
        end = last
    if start + end != size:
        raise InputError(f"{path}: {size} bytes where its header needs {start + end}")
    return tensors


def _read_header(path: epath.Path) -> tuple[dict, int]:
    """(header without metadata, offset of the data)."""
    try:
        size = path.stat().length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, size))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if 8 + length > size:
        raise InputError(f"{path}: truncated, {size} bytes where its header needs at least {8 + length}")
    try:
        header = json.loads(text, object_pairs_hook=_once)
        return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


def _stored(path: epath.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> StoredTensor:
    each = math.prod(shape[1:]) * dtype.itemsize

    def read(first, last, out=None):
        value = np.empty(shape and (last - first, *shape[1:]), dtype) if out is None else out
        data = memoryview(value.reshape(-1).view(np.uint8))
        try:
            count = _read_into(path, offset + first * each, data)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        if count != len(data):
            raise InputError(f"{path}: truncated while it was read")
        return value

    def reshape(other):
        return _stored(path, dtype, other, offset)

    return StoredTensor(shape, dtype, str(path), read, reshape)


def _read_into(path: epath.Path, offset: int, data: memoryview) -> int:
    if files.is_local(path):
        return direct.read_into(os.fspath(path), offset, data)
    with path.open("rb") as file:
        file.seek(offset)
        return file.readinto(data)


# --- leaves --------------------------------------------------------------------------------------------------------


def stored_shape(parameter: Parameter) -> tuple[int, ...]:
    """The Hugging Face shape of one tensor, per expert; with hf_rows, the shape of our rows of it."""
    shape = parameter.shape[1:] if parameter.per_expert else parameter.shape
    if parameter.matrix:
        inputs = 1 if parameter.per_expert else parameter.num_inputs
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if parameter.hf_name.endswith(".bias") else shape


def source_name(parameter: Parameter, layer: int | None, expert: int | None = None) -> str:
    """The tensor's Hugging Face name. expert None: the merged tensor of all experts (dFactory's form)."""
    name = parameter.hf_name
    if parameter.per_expert and expert is None:
        name = name.replace(".{expert}", "").removesuffix(".weight")
    return name.format(layer=layer, expert=expert)


def drop_unused(tensors: dict[str, StoredTensor], config: ModelConfig, mtp_layers: int = 0) -> tuple[dict, list[str]]:
    """Returns (tensors without rotary buffers and multi-token-prediction layers, notices).

    Those layers follow the model's own; num_nextn_predict_layers counts them, or an eh_proj tensor marks them.
    """
    layer_of = {name: int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    predictors = {layer for name, layer in layer_of.items() if name.endswith(".eh_proj.weight")}
    predictors |= set(range(config.num_layers, config.num_layers + mtp_layers))
    dropped = {n for n, layer in layer_of.items() if layer >= config.num_layers and layer in predictors}
    buffers = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    notices = []
    if dropped:
        layers = ", ".join(str(layer) for layer in sorted({layer_of[name] for name in dropped}))
        notices.append(f"dropped {len(dropped)} tensors of multi-token prediction (layer {layers})")
    return {name: t for name, t in tensors.items() if name not in dropped | buffers}, notices


def plan_leaves(tensors: dict[str, StoredTensor], config: ModelConfig) -> list[LeafPlan]:
    """The sources of every leaf, in the order of `parameters.leaves`.

    Raises InputError naming a tensor that is missing, unexpected or of the wrong shape, and its file.
    """
    _check_counts(tensors, config)
    tensors = _without_fused_experts(tensors, config)
    unclaimed = set(tensors)
    rows = _rows_claimed(config)
    plans = []
    for name, (parameter, layer) in parameters.leaves(config).items():
        names = [source_name(parameter, layer)]
        shape = stored_shape(parameter)
        if parameter.per_expert and names[0] in tensors:
            shape = parameter.shape[:1] + shape
        elif parameter.per_expert:
            names = [source_name(parameter, layer, expert) for expert in range(parameter.shape[0])]
        elif parameter.hf_rows:
            shape = (rows[names[0]], *shape[1:])
        for source in names:
            _check_source(tensors, source, shape)
        sources = tuple(tensors[source] for source in names)
        if len({source.dtype for source in sources}) > 1:
            raise InputError(f"the experts of {source_name(parameter, layer)} are stored in several dtypes")
        plans.append(LeafPlan(name, parameter, sources))
        unclaimed.difference_update(names)
    if unclaimed:
        raise InputError(f"unexpected tensor {_some(unclaimed)}: the config declares no such parameter")
    return plans


def _without_fused_experts(tensors: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Splits gate_up_proj of transformers 5, [experts, 2 width, embed], into the gate and up rows of each expert.

    Other models store [experts, embed, 2 width]; if that is the same shape, the check of down_proj's shape tells the
    two apart.
    """
    each, width = config.num_experts, config.moe_intermediate_size
    split = dict(tensors)
    for name in [name for name in tensors if name.endswith(".mlp.experts.gate_up_proj")]:
        _check_source(tensors, name, (each, 2 * width, config.hidden_size))
        fused = split.pop(name)
        if fused.reshape is None:
            raise InputError(f"{fused.file}: {name} cannot be read in parts")
        rows = fused.reshape((2 * each * width, config.hidden_size))
        for part in range(2 * each):
            one = name.replace("gate_up_proj", f"{part // 2}.{('gate', 'up')[part % 2]}_proj.weight")
            if one in split:
                raise InputError(f"{fused.file}: {name} holds {one}, which is also in {split[one].file}")
            split[one] = rows.rows(part * width, (part + 1) * width)
    return split


def _check_counts(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Refuses absurd counts in config.json before they are expanded into names."""
    if config.num_layers > len(tensors):
        raise InputError(f"config.json: num_hidden_layers={config.num_layers}, but there are {len(tensors)} tensors")
    if config.num_experts > max(len(tensors), *(tensor.shape[0] for tensor in tensors.values() if tensor.shape)):
        raise InputError(f"config.json: num_experts={config.num_experts}, but there are {len(tensors)} tensors")


def _rows_claimed(config: ModelConfig) -> dict[str, int]:
    """{fused tensor: rows}, summed over the leaves that are cut from it."""
    rows: dict[str, int] = collections.Counter()
    for parameter, layer in parameters.leaves(config).values():
        if parameter.hf_rows:
            rows[source_name(parameter, layer)] += parameter.hf_rows[1] - parameter.hf_rows[0]
    return rows


def _check_source(tensors: dict[str, StoredTensor], name: str, shape: tuple[int, ...]) -> None:
    if name not in tensors:
        raise InputError(f"missing tensor {name}, expected with shape {list(shape)}")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise InputError(f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def leaves(plans: Iterable[LeafPlan], dtype: np.dtype | None = None) -> list[Leaf]:
    """The leaves in our layout, read when they are asked for."""

    def leaf(plan: LeafPlan) -> Leaf:
        target = target_dtype(plan.name, plan.dtype, dtype)
        read = functools.partial(_read_experts if plan.parameter.per_expert else _read_rows, plan, target)
        return Leaf(plan.name, plan.parameter.shape, target, read, split_axis(plan.parameter))

    return [leaf(plan) for plan in plans]


def _read_rows(plan: LeafPlan, dtype: np.dtype, first: int, last: int) -> np.ndarray:
    parameter = plan.parameter
    start, stop = parameter.hf_rows or (0, plan.sources[0].shape[0])
    each = (stop - start) // parameter.shape[split_axis(parameter)]
    value = plan.sources[0].read(start + first * each, start + last * each).astype(dtype, copy=False)
    axis, shape = split_axis(parameter), parameter.shape
    return (transposed(value) if parameter.matrix else value).reshape(*shape[:axis], last - first, *shape[axis + 1 :])


def _read_experts(plan: LeafPlan, dtype: np.dtype, first: int, last: int) -> np.ndarray:
    if len(plan.sources) == 1:  # the merged form
        return transposed(plan.sources[0].read(first, last).astype(dtype, copy=False))
    value = _scratch((last - first, *stored_shape(plan.parameter)), plan.dtype)
    for row, source in zip(value, plan.sources[first:last], strict=True):
        source.read(0, len(row), out=row)
    return transposed(value.astype(dtype, copy=False))


_THREAD = threading.local()


def _scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A buffer that this thread reuses for each slab: mapping fresh pages costs as much as filling them."""
    count = math.prod(shape) * dtype.itemsize
    if getattr(_THREAD, "bytes", np.empty(0)).size < count:
        _THREAD.bytes = np.empty(count, np.uint8)
    return _THREAD.bytes[:count].view(dtype).reshape(shape)


def transposed(value: np.ndarray) -> np.ndarray:
    """A copy with the last two axes swapped, made on the CPU device: 4 times as fast as numpy's strided copy."""
    bits = value.view(f"uint{8 * value.itemsize}").swapaxes(-1, -2)
    device = digest.cpu_device()
    copy = bits.copy("C") if device is None else np.asarray(jax.device_put(bits, device, may_alias=False))
    return copy.view(value.dtype)
