"""Checkpoints of a training run: written in the background, restored bit for bit or not at all.

A step is a weights checkpoint (files.py) plus the optimizer's state and the trainer's own values. All processes of a
run make the same calls; process 0 writes the small files, renames and deletes.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.checkpoint import arrays, digest, files, weights
from llada_jax.checkpoint.files import DamagedError
from llada_jax.checkpoint.weights import steps
from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora

__all__ = ["Saver", "restore", "scores", "steps"]

_REPLICA_SLICE_BYTES = 4 * 2**20
_DISCARD_ROUNDS = 5


class Saver:
    """Writes steps to `directory` (the checkpoints/ of a workdir), one at a time, in the background.

    scored_by: JSON values on which a score depends, such as the block size. They are saved with the score, and only
    scores with equal scored_by are ranked together. Each save keeps the newest `keep_last` steps, the `keep_best` steps
    of the lowest score and the multiples of `keep_every`, and deletes the others; keep_last 0 keeps all. Leftovers of a
    run that died while saving are deleted at once.
    """

    def __init__(
        self, directory: str | os.PathLike, keep_last: int = 0, keep_best: int = 0, keep_every: int = 0,
        scored_by: dict | None = None,
    ):  # fmt: skip
        self._directory, self._scored_by = files.absolute(directory), scored_by
        self._keep = keep_last, keep_best, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._checkpointer = _make_checkpointer()
        logging.getLogger("absl").addFilter(_is_news)
        if jax.process_index() == 0:
            _remove_leftovers(self._directory)

    def save(
        self,
        step: int,
        params,
        optimizer,
        host_state: dict,
        config: ModelConfig | Lora,
        tokenizer_files: dict[str, bytes],
        lineage: dict,
        score: float | None = None,
    ) -> None:
        """Starts saving; returns when everything is copied off the devices.

        params: the tree of parameters.abstract(config). optimizer: any pytree of arrays. host_state: JSON values.
        score: ranks the steps, lower is better; a step without a score is never among the best. During the copy the
        weights (not the optimizer) are on the devices twice. Raises InputError if the step exists, and the error of the
        previous save if it failed.
        """
        self.wait()
        target = self._directory / str(step)
        if files.is_complete(target):
            raise InputError(f"{target}: this step is saved already")
        json.dumps(host_state)  # a caller's mistake fails here, not in the background
        trees = {"params": _unstack(params, config), "optimizer": _named(optimizer)}
        trees = {folder: tree for folder, tree in trees.items() if tree}
        entries = {"optimizer": {}} | {folder: _describe(tree) for folder, tree in trees.items()}
        directory = self._directory / f".{step}.partial" if files.is_local(target) else target
        items = {folder: ocp.args.PyTreeSave(tree, save_args=_chunked(tree)) for folder, tree in trees.items()}
        failed = None
        try:
            self._checkpointer.save(directory, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # of the store: raised by wait(), on all processes
            failed = error

        def finish():
            try:
                if failed is not None:
                    raise failed
                self._checkpointer.wait_until_finished()
                if jax.process_index() == 0:
                    weights.write_header(directory, config, tokenizer_files, lineage)
                    state = {"step": step, "score": score, "host": host_state}
                    if score is not None and self._scored_by is not None:
                        state["scored_by"] = self._scored_by
                    files.write_json(directory / "train_state.json", state)
                    files.finish(directory, entries)
                    if directory != target:
                        target.rmtree(missing_ok=True)  # incomplete, or save() would have refused
                        directory.rename(target)
                    _delete_old(self._directory, *self._keep, self._scored_by)
            except BaseException as error:  # raised by wait(), in the caller's thread
                if jax.process_index() == 0:
                    _discard(directory)
                self._error = error

        self._thread = threading.Thread(target=finish, name=f"save-{step}")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last save failed in this process; wait() raises its error."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when all processes have completed the last save. Raises its error, once."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        arrays.agree(error, f"{self._directory}: another process could not save")


def _chunked(tree: dict) -> dict:
    """Small chunks instead of Orbax's whole shards: a later run with more devices then reads only its parts."""

    def chunks(leaf):
        experts_apart = (0,) if files.holds_experts(leaf.shape) else ()
        return ocp.SaveArgs(chunk_byte_size=files.CHUNK_BYTES, shard_axes=experts_apart)

    return jax.tree.map(chunks, tree)


def _make_checkpointer() -> ocp.AsyncCheckpointer:
    # Orbax shares the writing of replicated arrays among their replicas, with a compiled slice for each part: worth it
    # for large arrays only. Compression would halve the rate and save little on weights.
    array_handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_REPLICA_SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, array_handler), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    handlers = {
        folder: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        for folder in files.TENSOR_FOLDERS
    }
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))


def restore(
    directory: str | os.PathLike, config: ModelConfig | Lora, abstract_params, abstract_optimizer, shardings
) -> tuple[int, dict, object, dict] | None:
    """Returns (step, params, optimizer, host_state) of the newest intact step, exactly as saved; None without a step.

    A step that is damaged on two readings is renamed to "<step>.damaged", with the reason in damaged.txt, and the
    previous one is tried. abstract_*: trees of jax.ShapeDtypeStruct. shardings: (tree for params, tree for optimizer)
    of jax.sharding.Sharding, on any mesh.
    Raises InputError if the step is of another model or optimizer, or if every step is damaged.
    """
    directory = epath.Path(directory)
    damaged, doubtful = 0, None
    while saved_steps := steps(directory):
        step = directory / str(saved_steps[-1])
        try:
            return saved_steps[-1], *_restore(step, config, abstract_params, abstract_optimizer, shardings)
        except DamagedError as error:
            if step != doubtful:  # a store may fail to read once
                doubtful = step
                continue
            damaged += 1
            if jax.process_index() == 0:
                print(f"step {step.name} is damaged and set aside: {error}", flush=True)
                _set_aside(step, str(error))
            arrays.agree(None, "")  # nobody lists the steps before the rename
    if damaged:
        raise InputError(f"{directory}: none of its {damaged} steps is intact")
    return None


def leaf_names(tree) -> list[str]:
    """The stored names of a pytree's leaves, such as "0.mu.dense.query", in the order of the leaves."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    if len(set(names)) != len(names):
        raise ValueError("two leaves of the tree have the same name")
    return names


def _named(tree) -> dict:
    leaves = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return dict(zip(leaf_names(tree), leaves, strict=True))


def _unstack(params, config: ModelConfig | Lora) -> dict:
    """parameters.unstack in one program; every slice keeps the sharding of its stack."""
    names = jax.tree.leaves(arrays.stacked_names(config), is_leaf=arrays.is_names)
    named = dict(zip(names, map(jnp.asarray, jax.tree.leaves(params)), strict=True))
    stacks = {layers: named.pop(layers) for layers in names if not isinstance(layers, str)}
    rows = _split_function(tuple(_row_sharding(stack) for stack in stacks.values()))(tuple(stacks.values()))
    for layers, arrays_of_layers in zip(stacks, rows, strict=True):
        named |= zip(layers, arrays_of_layers, strict=True)
    return named


def _row_sharding(stack: jax.Array):
    if not isinstance(stack.sharding, NamedSharding):
        return stack.sharding
    return NamedSharding(stack.sharding.mesh, PartitionSpec(*stack.sharding.spec[1:]))


@functools.cache
def _split_function(row_shardings: tuple):
    return jax.jit(lambda stacks: tuple(tuple(stack) for stack in stacks), out_shardings=row_shardings)


def _describe(tree: dict) -> dict[str, files.TensorEntry]:
    """Entries with digests, computed on the devices before the copy."""
    on_device = {name: leaf for name, leaf in tree.items() if isinstance(leaf, jax.Array)}
    digests = dict(zip(on_device, digest.device_digests(list(on_device.values())), strict=True))
    return {name: files.entry_of(leaf, digests[name][0] if name in digests else None) for name, leaf in tree.items()}


def _restore(directory: epath.Path, config: ModelConfig | Lora, abstract_params, abstract_optimizer, shardings):
    error = None
    try:
        digests = files.read_digests(directory)
        stored = _fields(weights.read_stored_config(directory))
        host_state = json.loads(files.read_file(directory, digests, "train_state.json"))["host"]
    except DamagedError as caught:
        error = caught
    arrays.agree(error, f"checkpoint {directory}: damaged, as another process found")
    for field, ours in ({name: None for name in stored} | _fields(config)).items():
        if (value := stored.get(field)) != ours:
            raise InputError(f"checkpoint {directory}: its model has {field}={value!r}, this run {ours!r}")
    names = jax.tree.leaves(arrays.stacked_names(config), is_leaf=arrays.is_names)
    params = _restore_tree(directory, digests, "params", names, abstract_params, shardings[0])
    names = leaf_names(abstract_optimizer)
    return params, _restore_tree(directory, digests, "optimizer", names, abstract_optimizer, shardings[1]), host_state


def _fields(config: ModelConfig | Lora) -> dict:
    """The fields that a run must share with the step it resumes from; a LoRA base may have moved, but not changed."""
    if isinstance(config, ModelConfig):
        return config.to_dict()
    adapters = {f"lora.{name}": value for name, value in config.to_dict().items() if name != "base"}
    return config.model.to_dict() | adapters


def _restore_tree(directory: epath.Path, digests: files.Digests, folder: str, names: list, abstract, shardings):
    reader = files.TensorReader(directory, folder, digests.tensors[folder])
    leaves, treedef = jax.tree.flatten(abstract)
    expected = {one for each in names for one in ([each] if isinstance(each, str) else each)}
    if different := sorted(expected ^ set(reader.entries)):
        side = "only in this run" if different[0] in expected else "only in the checkpoint"
        raise InputError(f'checkpoint {directory}: {folder} do not match: "{different[0]}" is {side}')
    for each, leaf in zip(names, leaves, strict=True):
        shape, dtype = arrays.stack_of(reader, each)
        if (shape, dtype) != (tuple(leaf.shape), leaf.dtype):
            name = each if isinstance(each, str) else each[0]
            raise InputError(
                f'checkpoint {directory}: {folder} do not match: "{name}" makes {dtype} {list(shape)}, '
                f"this run has {leaf.dtype} {list(leaf.shape)}"
            )
    loaded = arrays.read_sharded(reader, list(zip(names, jax.tree.leaves(shardings), strict=True)))
    return jax.tree.unflatten(treedef, loaded)


def _set_aside(step: epath.Path, reason: str) -> None:
    (step / "damaged.txt").write_text(reason + "\n")
    if not files.is_local(step):
        (step / files.DIGESTS).rename(step / f"{files.DIGESTS}.damaged")
        return
    taken = {path.name for path in step.parent.iterdir()}
    names = (f"{step.name}.damaged{suffix}" for suffix in ("", *(f".{n}" for n in range(2, len(taken) + 3))))
    step.rename(step.parent / next(name for name in names if name not in taken))


def _remove_leftovers(directory: epath.Path) -> None:
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if re.match(r"\.\d+\.(partial|deleted)", path.name):
            print(f"removing {path}, which an interrupted run left", flush=True)
            path.rmtree()


class Score(NamedTuple):
    """A step's held-out score, and the values it depends on (scored_by of Saver)."""

    value: float
    by: dict | None


def scores(directory: str | os.PathLike) -> dict[int, Score]:
    """{step: score} of the complete steps in a checkpoints/ folder with a finite score, lowest first. Scores with
    different `by` are not comparable.
    """
    directory = epath.Path(directory)
    scored = {step: _score(directory / str(step)) for step in steps(directory)}
    ranked = sorted((score.value, step) for step, score in scored.items() if score is not None)
    return {step: scored[step] for _, step in ranked}


def difference(one: dict | None, other: dict | None) -> str:
    """How `one` scored_by differs from the `other`, as text: "block_size=4, not 32"; "" if they are equal."""
    one, other = one or {}, other or {}
    fields = [name for name in one | other if one.get(name) != other.get(name)]
    return "; ".join(f"{name}={one.get(name)!r}, not {other.get(name)!r}" for name in fields)


def _score(step: epath.Path) -> Score | None:
    try:
        state = json.loads(files.read_file(step, files.read_digests(step), "train_state.json"))
    except DamagedError:  # converted weights, without this file, or damage, which restoring reports
        return None
    value = state.get("score")
    return None if value is None or not math.isfinite(value) else Score(value, state.get("scored_by"))


def _delete_old(directory: epath.Path, keep_last: int, keep_best: int, keep_every: int, scored_by: dict | None) -> None:
    older = steps(directory)[:-keep_last] if keep_last else []
    scored = scores(directory) if older and keep_best else {}
    best = [step for step, score in scored.items() if score.by == scored_by][:keep_best]
    for step in older:
        if step not in best and not (keep_every and step % keep_every == 0):
            if step in scored and (why := difference(scored[step].by, scored_by)):
                print(f"{directory}: step {step} is not ranked with the others: scored by {why}", flush=True)
            try:
                _delete(directory / str(step))
            except OSError as error:  # the new step is saved all the same
                print(f"{directory}: step {step} could not be deleted ({error})", flush=True)


def _delete(step: epath.Path) -> None:
    """Removes a step so that it never looks complete while only half of it is deleted."""
    if files.is_local(step):
        step = step.rename(step.parent / f".{step.name}.deleted")
    else:
        (step / files.DIGESTS).unlink()
    step.rmtree()


def _discard(directory: epath.Path) -> None:
    """Removes what a failed save has written, and what it still writes meanwhile, as far as the store allows."""
    for _ in range(_DISCARD_ROUNDS):
        with contextlib.suppress(Exception):
            for path in list(directory.parent.iterdir()):
                ours = path.name == directory.name or path.name.startswith(f"{directory.name}.orbax")
                if ours and not files.is_complete(path):
                    path.rmtree()
        time.sleep(0.2)


def _is_news(record: logging.LogRecord) -> bool:
    """False for errors that Orbax logs with a stack trace: they are also raised, and reported in one line."""
    return "/orbax/" not in record.pathname or record.levelno < logging.ERROR
