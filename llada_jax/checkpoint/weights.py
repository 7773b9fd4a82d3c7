"""Weights checkpoints: streaming write, verified load. The files are described in files.py.

A converted model and a step of a training run have the same layout; a step only has more files. A LoRA step holds
adapters; its weights are those of its base with the adapters merged or beside them (checkpoint/lora.py). Every `path`
may be a checkpoint, or a workdir (or its checkpoints/ folder), which stands for its newest intact step.
"""

import functools
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llada_jax import sharding
from llada_jax.checkpoint import arrays, files, stream
from llada_jax.checkpoint.files import DamagedError
from llada_jax.checkpoint.lora import MergedReader, attached, base_of, levels, read_sharded, stored_entries
from llada_jax.checkpoint.progress import byte_progress
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora

T = TypeVar("T")


class Model(NamedTuple):
    """A loaded checkpoint. params: the tree of parameters.abstract(config). lineage: config.json's record of origin."""

    config: ModelConfig
    params: dict
    tokenizer: object | None  # tokenizer.Tokenizer
    lineage: dict


def write_weights(
    out: str | os.PathLike,
    config: ModelConfig,
    leaves: Iterable[tuple[str, np.ndarray]],
    tokenizer_files: dict[str, bytes],
    lineage: dict,
) -> None:
    """Writes a checkpoint of arrays in memory. leaves: {leaf name: array}.items(); the rest as in write_leaves."""
    write_leaves(out, config, [stream.leaf_of(*pair) for pair in leaves], tokenizer_files, lineage, identity=None)


def save_params(
    out: str | os.PathLike, params: parameters.Params, config: ModelConfig, tokenizer=None, lineage: dict | None = None
) -> None:
    """Writes weights in memory as a checkpoint, which every command and `load_checkpoint` reads.

    params: the tree of parameters.abstract(config), whose arrays this process can read. tokenizer: a Tokenizer, such as
    the one of `load_checkpoint`, or None. lineage: what the weights come from, for JSON.
    Raises InputError when `out` exists or the tree is not the one of the config.

    Example:
        >>> import jax, llada_jax
        >>> config = llada_jax.preset("tiny")
        >>> llada_jax.save_params("saved", llada_jax.init(config, jax.random.key(0)), config)
        >>> llada_jax.load_checkpoint("saved").config == config
        True
    """
    expected, given = (
        {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}
        for tree in (parameters.abstract(config), params)
    )
    for name in sorted(expected ^ given):
        raise InputError(f"params: {name} is only in {'the model' if name in expected else 'the given tree'}")
    leaves = parameters.unstack(jax.tree.map(np.asarray, params), config)
    write_weights(out, config, leaves.items(), {} if tokenizer is None else tokenizer.files, lineage or {})


def write_leaves(
    out: str | os.PathLike,
    config: ModelConfig,
    leaves: Sequence[stream.Leaf],
    tokenizer_files: dict[str, bytes],
    lineage: dict,
    identity: str | None,
) -> None:
    """Writes a checkpoint from tensors that are computed on demand, a few slabs at a time.

    leaves: with the names and shapes of parameters.leaves(config), in any order. identity: a digest of what determines
    the tensors (stream.identity_of), by which a later run resumes the output of a killed one (stream.partial); None:
    start again.
    Raises InputError if `out` exists, or a leaf is missing, unknown, given twice or of another shape.
    """
    out = files.absolute(out)
    _check_leaves(leaves, config)
    if identity is not None:
        kinds = [(leaf.name, leaf.shape, leaf.dtype.name, leaf.axis) for leaf in leaves]
        layout = (files.FORMAT, files.SLAB_BYTES, files.CHUNK_BYTES)
        identity = stream.identity_of(identity, config.to_dict(), lineage, kinds, layout, stream.since_boot())
    with stream.partial(out, identity) as (directory, notes):
        write_header(directory, config, tokenizer_files, lineage)
        with byte_progress(f"writing {out}", sum(leaf.nbytes for leaf in leaves)) as advance:
            entries = stream.write_tensors(directory / "params", leaves, notes, advance)
        files.finish(directory, {"params": entries})


def write_header(
    directory: epath.Path, config: ModelConfig | Lora, tokenizer_files: dict[str, bytes], lineage: dict
) -> None:
    """Writes config.json and tokenizer/."""
    lora = isinstance(config, Lora)
    sections = {"model": config.model.to_dict(), "lora": config.to_dict()} if lora else {"model": config.to_dict()}
    files.write_json(
        directory / "config.json", {"format": files.FORMAT, **sections, "lineage": lineage, "code": code()}
    )
    for name, data in tokenizer_files.items():
        path = directory / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@functools.cache
def code() -> str:
    """The code that writes a checkpoint: the version of this package or, in a git clone, its commit."""
    repository = epath.Path(__file__).parents[2]
    line = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        if (repository / ".git").exists():
            return (
                f"llada_jax, commit {subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()}"
            )
        return f"llada_jax {importlib.metadata.version('llada_jax')}"
    except (OSError, subprocess.CalledProcessError, importlib.metadata.PackageNotFoundError):
        return "llada_jax"


def _check_leaves(leaves: Sequence[stream.Leaf], config: ModelConfig) -> None:
    missing = {name: parameter.shape for name, (parameter, _) in parameters.leaves(config).items()}
    seen = set()
    for name, shape in ((leaf.name, tuple(leaf.shape)) for leaf in leaves):
        if name not in missing:
            raise InputError(f'weights: leaf "{name}" is {"given twice" if name in seen else "not one of the model"}')
        if shape != missing[name]:
            raise InputError(f'weights: leaf "{name}" has shape {list(shape)}, expected {list(missing[name])}')
        del missing[name]
        seen.add(name)
    if missing:
        raise InputError(f'weights: leaf "{next(iter(missing))}" and {len(missing) - 1} others are missing')


# ---- finding


def steps(directory: str | os.PathLike) -> list[int]:
    """The complete steps of a checkpoints/ folder, oldest first."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    numbers = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
    return sorted(step for step in numbers if files.is_complete(directory / str(step)))


def resolve(path: str | os.PathLike) -> epath.Path:
    """The directory of the checkpoint that `path` stands for, after its weights are verified.

    Raises InputError naming what is missing or damaged.
    """

    def check(directory: epath.Path) -> epath.Path:
        _raise_first(_problems(directory, ("params",)))
        return directory

    return _newest_intact(path, check)


def locate(path: str | os.PathLike) -> epath.Path:
    """The directory of the checkpoint that `path` stands for. The config and the bases of a LoRA step are verified; no
    weights are read. Raises InputError naming what is missing or damaged.
    """

    def check(directory: epath.Path) -> epath.Path:
        open_weights(directory)
        return directory

    return _newest_intact(path, check)


def verify(path: str | os.PathLike) -> list[str]:
    """Problems of the checkpoint in directory `path`, one line each; [] if everything is as it was written."""
    return list(_problems(epath.Path(path), files.TENSOR_FOLDERS))


def _problems(directory: epath.Path, folders: Iterable[str]) -> Iterator[str]:
    try:
        digests = files.read_digests(directory)
    except InputError as error:
        yield str(error)
        return
    for name in digests.files:
        try:
            files.read_file(directory, digests, name)
        except DamagedError as error:
            yield str(error)
    yield from files.verify_tensors(directory, digests, folders)
    try:
        config = read_stored_config(directory)
        base = base_of(config, directory) if isinstance(config, Lora) else None
    except DamagedError:
        return  # config.json, as said above
    except InputError as error:
        yield str(error)
        return
    if base is not None:
        yield from _problems(base, ("params",))


def _raise_first(problems: Iterable[str]) -> None:
    for problem in problems:
        raise DamagedError(problem)


def _newest_intact(path: str | os.PathLike, attempt: Callable[[epath.Path], T]) -> T:
    """Returns attempt(directory) of the checkpoint; of a workdir, of the newest step that raises no DamagedError."""
    path = epath.Path(path)
    directories = candidates(path)
    for directory in directories:
        try:
            return attempt(directory)
        except DamagedError as error:
            if directories == [path]:
                raise
            print(f"skipping step {directory.name}: {error}", file=sys.stderr)
    raise InputError(f"{path}: none of its {len(directories)} steps is intact")


def candidates(path: str | os.PathLike) -> list[epath.Path]:
    """[path] for a checkpoint; the complete steps of a workdir, newest first. Raises InputError if it is neither."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"checkpoint {path}: no such directory")
    if files.is_complete(path):
        return [path]
    for folder in (path / "checkpoints", path):
        if saved := steps(folder):
            return [folder / str(step) for step in reversed(saved)]
    raise InputError(f"checkpoint {path}: neither a complete checkpoint (no {files.DIGESTS}) nor a workdir with steps")


def directory_of(path: str | os.PathLike, step: int | None = None) -> epath.Path:
    """The directory of a checkpoint, or of a step of a workdir (default: the newest). Reads no weights.

    Raises InputError naming the existing steps.
    """
    directories = candidates(path)
    if step is None:
        return directories[0]
    for directory in directories:
        if directory.name == str(step):
            return directory
    raise InputError(f"--step={step}: {path} has {', '.join(each.name for each in directories)}")


# ---- loading


def read_config(path: str | os.PathLike) -> tuple[ModelConfig, dict]:
    """Returns (config, lineage). Raises InputError naming what is missing or damaged."""
    return _newest_intact(path, _read_config)


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer.Tokenizer of a checkpoint, or None. Raises InputError naming a damaged file."""
    return _newest_intact(path, _load_tokenizer)


def load_params(path: str | os.PathLike, dtype=None, shardings=None, verify: bool = True) -> dict:
    """Loads the weights as the tree of parameters.abstract(config).

    dtype: cast floating weights to it (not expert_bias); None keeps the stored dtypes. shardings: a tree of
    jax.sharding.Sharding with the structure of parameters.abstract, of which each process reads its devices' parts;
    None: whole arrays on the default device. verify: check the digests. Beside the result, the host holds about one
    stacked weight.

    Adapters of a LoRA step are merged in float32; if the weights stay narrower, the adapters are attached beside them
    (model/lora.attach) and the forward pass adds them.
    Raises InputError naming the tensor when one is missing, cannot be read or has another digest than was written.

    Example:
        >>> import jax.numpy as jnp, llada_jax
        >>> llada_jax.load_params("checkpoint", dtype=jnp.bfloat16)["embedding"].dtype
        dtype(bfloat16)
    """
    return _newest_intact(path, lambda directory: _load_params(directory, dtype, shardings, verify))


def load_checkpoint(path: str | os.PathLike, dtype=None, verify: bool = True, mesh: Mesh | None = None) -> Model:
    """Loads config, weights (dtype and verify as in load_params), tokenizer (or None) and lineage of a checkpoint.

    mesh: lay the weights out over it as sharding.RULES say; None: whole, on the default device.

    Raises InputError naming the file or tensor that is missing or damaged.

    Example:
        >>> import llada_jax
        >>> model = llada_jax.load_checkpoint("checkpoint")
        >>> model.config.architecture, model.params["embedding"].shape
        ('llama', (512, 128))
        >>> model.tokenizer.decode(model.tokenizer.encode("def f("))
        'def f('
    """

    def load(directory: epath.Path) -> Model:
        config, lineage = _read_config(directory)
        tokenizer = _load_tokenizer(directory)
        layouts = None
        if mesh is not None:
            layouts = sharding.shardings(parameters.abstract(config), parameters.logical_axes(config), mesh)
        return Model(config, _load_params(directory, dtype, layouts, verify), tokenizer, lineage)

    return _newest_intact(path, load)


def _read_config(directory: epath.Path) -> tuple[ModelConfig, dict]:
    values = read_header(directory)
    return ModelConfig.from_dict(values["model"]), values["lineage"]


def read_stored_config(directory: epath.Path) -> ModelConfig | Lora:
    """The config of the tensors in params/: a ModelConfig, or the Lora of adapters."""
    values = read_header(directory)
    model = ModelConfig.from_dict(values["model"])
    return Lora.from_dict(model, values["lora"]) if "lora" in values else model


def read_header(directory: epath.Path) -> dict:
    """config.json: "model", "lineage", "code" (the version that wrote it) and, in a LoRA run, "lora"."""
    return json.loads(files.read_file(directory, files.read_digests(directory), "config.json"))


def read_tokenizer_files(directory: epath.Path) -> dict[str, bytes]:
    """{file name: content} of tokenizer/, verified; {} without a tokenizer."""
    digests = files.read_digests(directory)
    names = [name for name in digests.files if name.startswith("tokenizer/")]
    return {name.removeprefix("tokenizer/"): files.read_file(directory, digests, name) for name in names}


def _load_tokenizer(directory: epath.Path):
    contents = read_tokenizer_files(directory)
    if not contents:
        return None
    from llada_jax.tokenizer import from_files, trained_with

    return from_files(contents, f"{directory}/tokenizer").with_bos(trained_with(read_header(directory)["lineage"]))


def open_weights(directory: epath.Path) -> files.TensorReader | MergedReader:
    """Reader of the model's tensors. Raises InputError if the base of a LoRA step is missing or has changed."""
    config = read_stored_config(directory)
    reader = files.TensorReader(directory, "params", files.read_digests(directory).tensors["params"])
    return (
        MergedReader(config, open_weights(base_of(config, directory)), reader) if isinstance(config, Lora) else reader
    )


def _load_params(directory: epath.Path, dtype, shardings, verify: bool) -> dict:
    config, _ = _read_config(directory)
    reader = open_weights(directory)
    for name, (parameter, _) in parameters.leaves(config).items():
        if name not in reader.entries or reader.entries[name].shape != parameter.shape:
            raise DamagedError(f'checkpoint {directory}: no tensor "{name}" of shape {list(parameter.shape)}')
    stacked = arrays.stacked_names(config)
    if isinstance(reader, MergedReader) and not _keeps_update(reader, dtype):
        base = _load_stacks(levels(reader)[0], stacked, dtype, shardings, verify)
        return attached(reader, base, stacked, shardings, verify)
    return _load_stacks(reader, stacked, dtype, shardings, verify)


def _keeps_update(reader: MergedReader, dtype) -> bool:
    """Whether weights of `dtype` (None: the stored dtypes) can represent a LoRA step's small update."""
    stored = stored_entries(reader)
    narrowed = {stored[name].dtype for name in stored if reader.entries[name].dtype != stored[name].dtype}
    return jnp.dtype(dtype) == np.float32 if dtype is not None else not narrowed


def _load_stacks(reader, stacked: dict, dtype, shardings, verify: bool) -> dict:
    names, treedef = jax.tree.flatten(stacked, is_leaf=arrays.is_names)
    targets = [_target_dtype(reader, each, dtype) for each in names]
    if shardings is None:
        loaded = [arrays.read_whole(reader, each, to, verify) for each, to in zip(names, targets, strict=True)]
        return jax.tree.unflatten(treedef, loaded)
    layouts = jax.tree.leaves(shardings)
    loaded = read_sharded(reader, list(zip(names, layouts, strict=True)), verify)
    for i, to in enumerate(targets):
        loaded[i] = arrays.cast_sharded(loaded[i], to)
    return jax.tree.unflatten(treedef, loaded)


def _target_dtype(reader: files.TensorReader | MergedReader, names: arrays.Names, dtype):
    _, stored = arrays.stack_of(reader, names)
    name = names if isinstance(names, str) else names[0]
    if dtype is None or name.endswith("expert_bias") or not jnp.issubdtype(stored, jnp.floating):
        return None
    return jnp.dtype(dtype)


def size(path: str | os.PathLike) -> tuple[int, int]:
    """Returns (number of tensors, bytes) of a checkpoint, from its digests.json."""
    entries = [e for folder in files.read_digests(epath.Path(path)).tensors.values() for e in folder.values()]
    return len(entries), sum(math.prod(e.shape) * e.dtype.itemsize for e in entries)
