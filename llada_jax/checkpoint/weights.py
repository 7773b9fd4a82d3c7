"""Weights checkpoints: streaming write, verified load. The files are described in files.py.

A converted model and a step of a training run have the same layout; a step only adds files. A LoRA step holds adapters,
and its weights are those of its base with the adapters merged, or beside them (training/lora.py). Wherever a path is
asked for, it may be a checkpoint, or a workdir (or its checkpoints/ folder), which stands for its newest intact step.
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
    """A loaded checkpoint. `params` is the tree of parameters.abstract(config)."""

    config: ModelConfig
    params: dict
    tokenizer: object | None  # interop.tokenizer.Tokenizer
    lineage: dict


def write_weights(
    out: str | os.PathLike,
    config: ModelConfig,
    leaves: Iterable[tuple[str, np.ndarray]],
    tokenizer_files: dict[str, bytes],
    lineage: dict,
) -> None:
    """Writes a checkpoint of arrays in memory, {leaf name: array}.items(); else as write_leaves."""
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
    """Writes a checkpoint of tensors that are still to be made, a few slabs at a time.

    The names and shapes must be those of parameters.leaves(config), in any order. identity: what the tensors are made
    of (stream.identity_of), by which a later run may go on with what this one leaves when it is killed
    (stream.partial); None: it starts anew.
    Raises InputError when `out` exists, or a leaf is missing, unknown, given twice or of another shape.
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
            entries = stream.write_leaves(directory / "params", leaves, notes, advance)
        files.finish(directory, {"params": entries})


def write_header(
    directory: epath.Path, config: ModelConfig | Lora, tokenizer_files: dict[str, bytes], lineage: dict
) -> None:
    """Writes config.json and tokenizer/."""
    lora = isinstance(config, Lora)
    held = {"model": config.model.to_dict(), "lora": config.to_dict()} if lora else {"model": config.to_dict()}
    files.write_json(directory / "config.json", {"format": files.FORMAT, **held, "lineage": lineage, "code": code()})
    for name, data in tokenizer_files.items():
        path = directory / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@functools.cache
def code() -> str:
    """What wrote a checkpoint: the version of this package or, in a clone of its repository, the commit."""
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
    """The directory of the checkpoint that `path` stands for, its weights verified.

    Raises InputError saying what is missing or damaged.
    """

    def check(directory: epath.Path) -> epath.Path:
        _raise_first(_problems(directory, ("params",)))
        return directory

    return _newest_intact(path, check)


def locate(path: str | os.PathLike) -> epath.Path:
    """The directory of the checkpoint that `path` stands for: its config and the bases of a LoRA step are verified, its
    weights are not read. Raises InputError saying what is missing or damaged.
    """

    def check(directory: epath.Path) -> epath.Path:
        open_weights(directory)
        return directory

    return _newest_intact(path, check)


def verify(path: str | os.PathLike) -> list[str]:
    """What is wrong with the checkpoint in directory `path`, one line each; [] when all of it is as it was written."""
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
        held = read_held(directory)
        base = base_of(held, directory) if isinstance(held, Lora) else None
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
    """attempt(directory of the checkpoint); in a workdir, of the newest step for which it finds no damage."""
    path = epath.Path(path)
    found = candidates(path)
    for directory in found:
        try:
            return attempt(directory)
        except DamagedError as error:
            if found == [path]:
                raise
            print(f"passing over step {directory.name}: {error}", file=sys.stderr)
    raise InputError(f"{path}: none of its {len(found)} steps is intact")


def candidates(path: str | os.PathLike) -> list[epath.Path]:
    """[path] for a checkpoint; the complete steps of a workdir, newest first. Raises InputError when it is neither."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"checkpoint {path}: no such directory")
    if files.is_complete(path):
        return [path]
    for folder in (path / "checkpoints", path):
        if found := steps(folder):
            return [folder / str(step) for step in reversed(found)]
    raise InputError(f"checkpoint {path}: neither a complete checkpoint (no {files.DIGESTS}) nor a workdir with steps")


def directory_of(path: str | os.PathLike, step: int | None = None) -> epath.Path:
    """The checkpoint that `path` is, or a step of the workdir that it is, by default the newest; its weights are not
    read. Raises InputError naming the steps there are.
    """
    found = candidates(path)
    if step is None:
        return found[0]
    for directory in found:
        if directory.name == str(step):
            return directory
    raise InputError(f"--step={step}: {path} has {', '.join(each.name for each in found)}")


# ---- loading


def read_config(path: str | os.PathLike) -> tuple[ModelConfig, dict]:
    """(config, lineage). Raises InputError naming what is missing or damaged."""
    return _newest_intact(path, _read_config)


def load_tokenizer(path: str | os.PathLike):
    """The interop.tokenizer.Tokenizer of a checkpoint, or None. Raises InputError naming a damaged file."""
    return _newest_intact(path, _load_tokenizer)


def load_params(path: str | os.PathLike, dtype=None, shardings=None, verify: bool = True) -> dict:
    """The weights, as the tree of parameters.abstract(config); those of a LoRA step are merged in float32 or, where its
    weights stay narrower than that, have the adapters beside them (model/lora.attach), which the forward pass adds.

    dtype: floating weights are cast to it (expert_bias is not); None keeps what is stored. shardings: tree of
    jax.sharding.Sharding with the structure of parameters.abstract: each process then reads the parts of its devices;
    None puts whole arrays on the default device. Host memory beside the result is about one stacked weight.
    Raises InputError naming the tensor when one is missing, cannot be read or has another digest than was written.

    Example:
        >>> import jax.numpy as jnp, llada_jax
        >>> llada_jax.load_params("checkpoint", dtype=jnp.bfloat16)["embedding"].dtype
        dtype(bfloat16)
    """
    return _newest_intact(path, lambda directory: _load_params(directory, dtype, shardings, verify))


def load_checkpoint(path: str | os.PathLike, dtype=None, verify: bool = True) -> Model:
    """Config, weights (as load_params gives them), tokenizer or None, and lineage.

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
        return Model(config, _load_params(directory, dtype, None, verify), tokenizer, lineage)

    return _newest_intact(path, load)


def _read_config(directory: epath.Path) -> tuple[ModelConfig, dict]:
    values = read_header(directory)
    return ModelConfig.from_dict(values["model"]), values["lineage"]


def read_held(directory: epath.Path) -> ModelConfig | Lora:
    """What the tensors in params/ are: a model's, or its adapters."""
    values = read_header(directory)
    model = ModelConfig.from_dict(values["model"])
    return Lora.from_dict(model, values["lora"]) if "lora" in values else model


def read_header(directory: epath.Path) -> dict:
    """config.json: "model", "lineage", of a LoRA run "lora", and "code", the version that wrote it."""
    return json.loads(files.read_file(directory, files.read_digests(directory), "config.json"))


def read_tokenizer_files(directory: epath.Path) -> dict[str, bytes]:
    """{file name: content} of tokenizer/, verified; {} without one."""
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
    """Reader of the model's tensors. Raises InputError when the base of a LoRA step is gone or another one."""
    held = read_held(directory)
    reader = files.TensorReader(directory, "params", files.read_digests(directory).tensors["params"])
    return MergedReader(held, open_weights(base_of(held, directory)), reader) if isinstance(held, Lora) else reader


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
    """Whether weights of `dtype` (None: as they are stored) can hold a LoRA step's small update."""
    stored = stored_entries(reader)
    kept = {stored[name].dtype for name in stored if reader.entries[name].dtype != stored[name].dtype}
    return jnp.dtype(dtype) == np.float32 if dtype is not None else not kept


def _load_stacks(reader, stacked: dict, dtype, shardings, verify: bool) -> dict:
    names, treedef = jax.tree.flatten(stacked, is_leaf=arrays.is_names)
    targets = [_target_dtype(reader, each, dtype) for each in names]
    if shardings is None:
        loaded = [arrays.read_whole(reader, each, to, verify) for each, to in zip(names, targets, strict=True)]
        return jax.tree.unflatten(treedef, loaded)
    where = jax.tree.leaves(shardings)
    loaded = read_sharded(reader, list(zip(names, where, strict=True)), verify)
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
    """(number of tensors, bytes) of a checkpoint, as its digests.json says."""
    entries = [e for folder in files.read_digests(epath.Path(path)).tensors.values() for e in folder.values()]
    return len(entries), sum(math.prod(e.shape) * e.dtype.itemsize for e in entries)
