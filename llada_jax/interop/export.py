"""Export: a checkpoint becomes a Hugging Face folder of safetensors, streamed slab by slab.

As on import, every name, shape and slice comes from model/declarations.py.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from llada_jax.checkpoint import files, weights
from llada_jax.checkpoint.lora import Rounding, stored_entries, update_of
from llada_jax.checkpoint.progress import byte_progress
from llada_jax.checkpoint.stream import identity_of, in_order, partial, slabs, split_axis, target_dtype
from llada_jax.errors import InputError
from llada_jax.interop import direct, hf_config
from llada_jax.interop.huggingface import parse_dtype, source_name, stored_shape, transposed
from llada_jax.interop.tied_head import HEAD
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import Parameter
from llada_jax.tokenizer import read_json

SHARD_BYTES = 5 * 10**9
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Target(NamedTuple):
    """One tensor of the folder: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Group(NamedTuple):
    """Leaves and targets with the same rows when each list is concatenated: one leaf and one tensor, one leaf and the
    tensors of its experts, or several leaves and one fused tensor.
    """

    leaves: list[tuple[str, Parameter]]
    targets: list[Target]

    @property
    def bytes(self) -> int:
        return sum(target.bytes for target in self.targets)


def export_checkpoint(
    path: str, out: str, shard_bytes: int = SHARD_BYTES, dtype: str | None = None, step: int | None = None
) -> None:
    """Writes a Hugging Face folder at `out`: config.json, tokenizer files, safetensors, and an index of several shards.

    path: a checkpoint, or a workdir, of which `step` (default: the newest) is exported; training may continue.
    dtype: "float32" or "bfloat16"; by default each tensor keeps its stored dtype. A float32 expert bias is never cast.
    shard_bytes: the size limit per shard; a shard exceeds it only if a single leaf (the experts of a layer) does.

    Weights of a LoRA step are merged in float32 and rounded once; the loss of that rounding is printed. `out` appears
    when it is complete; a killed run resumes after its last complete shard. Raises InputError if `out` exists, or if a
    tensor is damaged or its dtype has no
    place in safetensors.

    Example:
        >>> import os, llada_jax
        >>> llada_jax.export_checkpoint("checkpoint", "exported")
        >>> sorted(os.listdir("exported"))
        ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    directory = weights.directory_of(path, step)
    config, lineage = weights.read_config(directory)
    reader = weights.open_weights(directory)
    to = None if dtype is None else parse_dtype(dtype)
    shards = _shards(_groups(config, reader, to), shard_bytes)
    others = weights.read_tokenizer_files(directory)
    generation = read_json(others, "generation_config.json")
    hf = hf_config.exported(config, source_config(lineage), shards[0][0].targets[0].dtype, generation)
    if modules := hf_config.remote_modules(hf):
        files_named = " and ".join(f"{name}.py" for name in modules)
        print(f"notice: transformers wants a copy of {files_named} in {out}; SGLang and dInfer do not need it")
    small = {"config.json": (json.dumps(hf, indent=2) + "\n").encode(), **others}
    rounding = Rounding()
    identity = identity_of(files.read_digests(directory).sha256, shard_bytes, dtype, hf)
    with partial(files.absolute(out), identity) as (folder, notes):
        total = sum(group.bytes for shard in shards for group in shard)
        with byte_progress(f"writing {out}", total) as advance:
            for number, shard in enumerate(shards):
                name = shard_name(number, len(shards))
                if name in notes.read():
                    advance(sum(group.bytes for group in shard))
                else:
                    _write_shard(folder / name, shard, reader, advance, rounding)
                    notes.add(name, "")
        if len(shards) > 1:
            weight_map = {
                t.name: shard_name(n, len(shards)) for n, shard in enumerate(shards) for g in shard for t in g.targets
            }
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name, content in reversed(small.items()):  # config.json last: without it there is no model here
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    rounding.report()


def shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def source_config(lineage: dict) -> dict:
    """config.json of the Hugging Face folder that the weights come from; {} if there is none."""
    while "source" in lineage and isinstance(lineage["source"], dict):  # a training run records its starting point
        lineage = lineage["source"]
    return lineage.get("hf_config", {})


def check_exportable(config: ModelConfig, lineage: dict) -> None:
    """Raises InputError naming a model field that an exported config.json could not express; called before training.

    lineage: of the checkpoint that the model starts from.
    """
    hf_config.exported(config, source_config(lineage), np.dtype(np.float32))


def _groups(config: ModelConfig, reader, to: np.dtype | None) -> list[Group]:
    """Every tensor of the folder, in the order of the layers."""
    groups: dict[str, Group] = {}
    for leaf, (parameter, layer) in parameters.leaves(config).items():
        dtype = target_dtype(leaf, np.dtype(stored_entries(reader)[leaf].dtype), to)
        if dtype.name not in _DTYPES:
            raise InputError(f'tensor "{leaf}" has dtype {dtype.name}; safetensors get {", ".join(_DTYPES)}')
        experts = range(parameter.shape[0]) if parameter.per_expert else [None]
        shape = stored_shape(parameter)
        targets = [Target(source_name(parameter, layer, expert), shape, dtype) for expert in experts]
        if fused := groups.get(targets[0].name):  # rows follow rows in the order of declaration
            (one,) = fused.targets
            targets = [one._replace(shape=(one.shape[0] + shape[0], *shape[1:]))]
            groups[one.name] = Group([*fused.leaves, (leaf, parameter)], targets)
        else:
            groups[targets[0].name] = Group([(leaf, parameter)], targets)
    if config.tie_word_embeddings and config.stores_tied_head:
        embedding = groups[parameters.declare(config)["embedding"].hf_name]
        groups[HEAD] = Group(embedding.leaves, [embedding.targets[0]._replace(name=HEAD)])
    return list(groups.values())


def _shards(groups: list[Group], limit: int) -> list[list[Group]]:
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.bytes
    return shards


def _write_shard(path: epath.Path, groups: list[Group], reader, advance, rounding: Rounding) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for target in (target for group in groups for target in group.targets):
        span = [offset, offset + target.bytes]
        header[target.name] = {"dtype": _DTYPES[target.dtype.name], "shape": list(target.shape), "data_offsets": span}
        offset += target.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with direct.Writer(os.fspath(path)) if files.is_local(path) else path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in in_order(functools.partial(_slab, reader.slabs(), rounding), _slab_tasks(groups, reader)):
            file.write(value.reshape(-1).view(np.uint8).data)
            advance(value.nbytes)


def _slab_tasks(groups: list[Group], reader) -> Iterator[tuple]:
    for group in groups:
        for leaf, parameter in group.leaves:
            axis, entry = split_axis(parameter), reader.entries[leaf]
            step = reader.slab_length(leaf, axis)
            for bounds in slabs(entry.shape, entry.dtype.itemsize, axis, step):
                yield leaf, parameter, group.targets[0].dtype, *bounds


def _slab(
    source, rounding: Rounding, leaf: str, parameter: Parameter, dtype: np.dtype, first: int, last: int
) -> np.ndarray:
    """Rows of the stored tensor, or whole experts."""
    value = source.read(leaf, split_axis(parameter), first, last)
    value = rounding.round(value, update_of(source, leaf, first, last, dtype), dtype)
    if parameter.matrix:
        columns = stored_shape(parameter)[1]
        value = transposed(
            value.reshape(-1, columns, value.shape[-1]) if parameter.per_expert else value.reshape(columns, -1)
        )
    return np.ascontiguousarray(value)
