"""Top-k checkpoint merge (Section 4.3): the plain mean of the best checkpoints' weights."""

import functools
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from llada_jax.checkpoint import saver, weights
from llada_jax.checkpoint.lora import Rounding, stored_entries, update_of
from llada_jax.checkpoint.stream import Leaf, split_axis, target_dtype
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.parameters import Parameter


def merge_checkpoints(
    paths: Sequence[str | os.PathLike], out: str | os.PathLike, dtype: np.dtype | None = None
) -> None:
    """Writes the mean of the checkpoints' weights at `out`: averaged in float32, slab by slab, with digests verified.

    Model and tokenizer are those of the first checkpoint, and so are the dtypes unless `dtype` is given. Adapters of
    LoRA steps are merged in float32 first; the loss of the final rounding is printed. Raises InputError if a checkpoint
    is damaged or of
    another model.

    Example:
        >>> import llada_jax
        >>> llada_jax.merge_checkpoints(["checkpoint", "checkpoint"], "merged")
        >>> llada_jax.load_checkpoint("merged").lineage["merged"]
        ['checkpoint', 'checkpoint']
    """
    directories = [weights.candidates(path)[0] for path in paths]
    if not directories:
        raise InputError("no checkpoints to merge")
    config, lineage = weights.read_config(directories[0])
    readers = []
    for directory in directories:
        other, _ = weights.read_config(directory)
        if other != config:
            field = next(name for name, value in config.to_dict().items() if other.to_dict()[name] != value)
            raise InputError(f"{directory}: model {field} differs from that of {directories[0]}")
        readers.append(weights.open_weights(directory))
    slabs = [reader.slabs() for reader in readers]
    rounding = Rounding()

    def mean(name: str, axis: int, to: np.dtype, first: int, last: int) -> np.ndarray:
        total = slabs[0].read(name, axis, first, last).astype(np.float32)
        for each in slabs[1:]:
            total += each.read(name, axis, first, last)
        total /= np.float32(len(slabs))
        updates = [update_of(each, name, first, last, to) for each in slabs]
        update = None if any(each is None for each in updates) else sum(updates) / np.float32(len(slabs))
        return rounding.round(total, update, to)

    def leaf(name: str, parameter: Parameter) -> Leaf:
        entry, axis = stored_entries(readers[0])[name], split_axis(parameter)
        to = target_dtype(name, entry.dtype, dtype)
        return Leaf(name, entry.shape, to, functools.partial(mean, name, axis, to), axis)

    weights.write_leaves(
        out,
        config,
        [leaf(name, parameter) for name, (parameter, _) in parameters.leaves(config).items()],
        weights.read_tokenizer_files(directories[0]),
        {"merged": [os.fspath(directory) for directory in directories], "source": lineage},
        identity=None,
    )
    rounding.report()


def best_steps(workdir: str | os.PathLike, count: int) -> list[tuple[epath.Path, float]]:
    """Returns [(checkpoint, held-out NELBO)] of the `count` best saved steps, best first.

    The score is the one recorded with the step, by which config.checkpoint.keep_best ranks too. Steps scored in another
    way than the last scored one, such as at another block size, are skipped with a printed line.

    Raises InputError if fewer than `count` steps have a score.
    """
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir}: not a workdir, there is no checkpoints/")
    scores = saver.scores(folder)
    last = scores[max(scores)].by if scores else None
    left_out = {step: why for step, score in sorted(scores.items()) if (why := saver.difference(score.by, last))}
    for step, why in left_out.items():
        print(f"step {step} is left out: scored by {why}", flush=True)
    ranked = [(folder / str(step), score.value) for step, score in scores.items() if step not in left_out]
    if len(ranked) < count:
        others = " that can be compared with the last one" if left_out else ""
        raise InputError(
            f"{workdir}: {len(ranked)} saved steps have a held-out score{others}, expected {count}; train with "
            f"checkpoint.keep_best={count}"
        )
    return ranked[:count]
