"""Export: a checkpoint of ours -> a Hugging Face folder of safetensors, streamed tensor by tensor.

Every name, shape and slice comes from the declarations (model/parameters.py), as on import.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llada_jax.errors import InputError
from llada_jax.interop import hf_config
from llada_jax.interop.huggingface import source_name, stored_shape
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import Parameter
from llada_jax.training import checkpoint
from llada_jax.training import checkpoint_files as files
from llada_jax.training.progress import byte_progress

SHARD_BYTES = 5 * 10**9
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Target(NamedTuple):
    """One tensor of the folder: the leaves it is made of, one below the other, and which expert of them."""

    name: str
    leaves: list[tuple[str, Parameter]]
    expert: int | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_checkpoint(path: str, out: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json, tokenizer files and safetensors (an index too when there is more than one shard) at `out`.

    path: a checkpoint, a step or a workdir. `out` appears when complete. Raises InputError when `out` exists, a tensor
    is damaged, or its dtype has no place in safetensors.
    """
    directory = checkpoint.candidates(path)[0]
    config, lineage = checkpoint.read_config(directory)
    reader = checkpoint.open_weights(directory)
    shards = _shards(_targets(config, reader), shard_bytes)
    with checkpoint.replacing(files.epath.Path(os.path.abspath(out))) as folder:
        folder = Path(folder)
        hf = source_config(lineage) | _changed(hf_config.to_hf(config), source_config(lineage))
        hf["torch_dtype"] = np.dtype(reader.entries["embedding"].dtype).name
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        for name, content in checkpoint.read_tokenizer_files(directory).items():
            (folder / name).write_bytes(content)
        total = sum(target.bytes for shard in shards for target in shard)
        with byte_progress(f"writing {out}", total) as advance:
            for number, shard in enumerate(shards):
                _write_shard(folder / shard_name(number, len(shards)), shard, reader, advance)
        if len(shards) > 1:
            where = {t.name: shard_name(n, len(shards)) for n, shard in enumerate(shards) for t in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def source_config(lineage: dict) -> dict:
    """config.json of the Hugging Face folder that the weights descend from; {} when there is none."""
    while "source" in lineage and isinstance(lineage["source"], dict):  # a training run names what it started from
        lineage = lineage["source"]
    return lineage.get("hf_config", {})


def _changed(ours: dict, source: dict) -> dict:
    """Our keys that say something else than the source's config.json does; the rest stays as it was written."""
    if not source:
        return ours
    try:
        same = hf_config.to_hf(hf_config.from_hf(source))
    except InputError:  # a GGUF file's metadata
        return ours
    return {key: value for key, value in ours.items() if key not in same or same[key] != value}


def _targets(config: ModelConfig, reader: files.TensorReader) -> list[Target]:
    """Every tensor of the folder, in the order of the layers."""
    found: dict[str, Target] = {}
    for leaf, (parameter, layer) in parameters.leaves(config).items():
        dtype = np.dtype(reader.entries[leaf].dtype)
        if dtype.name not in _DTYPES:
            raise InputError(f'tensor "{leaf}" has dtype {dtype.name}; safetensors get {", ".join(_DTYPES)}')
        for expert in range(parameter.shape[0]) if parameter.per_expert else [None]:
            name, shape = source_name(parameter, layer, expert), stored_shape(parameter)
            if name in found:  # fused: rows follow rows in the order of declaration
                one = found[name]
                shape = (one.shape[0] + shape[0], *shape[1:])
                found[name] = one._replace(leaves=[*one.leaves, (leaf, parameter)], shape=shape)
            else:
                found[name] = Target(name, [(leaf, parameter)], expert, shape, dtype)
    return list(found.values())


def _shards(targets: list[Target], limit: int) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if shards[-1] and size + target.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.bytes
    return shards


def _write_shard(path: Path, targets: list[Target], reader: files.TensorReader, advance) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for target in targets:
        span = [offset, offset + target.bytes]
        header[target.name] = {"dtype": _DTYPES[target.dtype.name], "shape": list(target.shape), "data_offsets": span}
        offset += target.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in _arrays(targets, reader):
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            advance(array.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _arrays(targets: list[Target], reader: files.TensorReader) -> Iterator[np.ndarray]:
    """The tensors' values; the leaf read last is kept, since its experts follow one another."""
    kept_name, kept = "", np.empty(0)
    for target in targets:
        parts = []
        for leaf, parameter in target.leaves:
            if leaf != kept_name:
                kept_name, kept = leaf, reader.read(leaf, verify=True)
            value = kept if target.expert is None else kept[target.expert]
            rows, *columns = stored_shape(parameter)
            if parameter.matrix:
                value = value.reshape(*columns, rows).T
            parts.append(value.reshape(rows, *columns))
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)
