"""Top-k checkpoint merge (Section 4.3): the plain mean of the weights of the best checkpoints."""

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from llada_jax.errors import InputError
from llada_jax.training import checkpoint, saver


def merge_checkpoints(paths: Sequence[str | os.PathLike], out: str | os.PathLike) -> None:
    """Writes the mean of the checkpoints' weights at `out`, averaged in float32, tensor by tensor, digests verified.

    dtypes, model and tokenizer are the first one's. Raises InputError when a checkpoint is damaged or of another model.
    """
    directories = [checkpoint.candidates(path)[0] for path in paths]
    if not directories:
        raise InputError("no checkpoints to merge")
    config, _ = checkpoint.read_config(directories[0])
    readers = []
    for directory in directories:
        other, _ = checkpoint.read_config(directory)
        if other != config:
            field = next(name for name, value in config.to_dict().items() if other.to_dict()[name] != value)
            raise InputError(f"{directory}: model {field} differs from that of {directories[0]}")
        readers.append(checkpoint.open_weights(directory))
    entries = readers[0].entries

    def means() -> Iterator[tuple[str, np.ndarray]]:
        for name, entry in entries.items():
            total = np.zeros(entry.shape, np.float32)
            for reader in readers:
                total += reader.read(name, verify=True).astype(np.float32)
            yield name, (total / np.float32(len(readers))).astype(entry.dtype)

    checkpoint.write_weights(
        out,
        config,
        means(),
        checkpoint.read_tokenizer_files(directories[0]),
        {"merged": [os.fspath(directory) for directory in directories]},
        total_bytes=sum(math.prod(e.shape) * e.dtype.itemsize for e in entries.values()),
    )


def best_steps(workdir: str | os.PathLike, count: int) -> list[tuple[epath.Path, float]]:
    """[(checkpoint, held-out NELBO)] of the `count` best saved steps, best first; the score is the one recorded with
    the step, which config.checkpoint.keep_best also goes by.

    Raises InputError when fewer steps were evaluated when they were saved.
    """
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir}: not a workdir, there is no checkpoints/")
    ranked = list(saver.scores(folder).items())
    if len(ranked) < count:
        raise InputError(
            f"{workdir}: {len(ranked)} saved steps have a held-out score, {count} wanted; train with "
            f"checkpoint.keep_best={count}"
        )
    return [(folder / str(step), score) for step, score in ranked[:count]]
