"""The rows that a run trains on and those that it holds out: of one packed dataset, or of a mixture of them."""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence
from fractions import Fraction

import jax
import numpy as np
from ml_collections import ConfigDict

from llada_jax.data.mixture import Mixture, component_seed
from llada_jax.data.order import Batch, Order, Rows
from llada_jax.data.rows import packed_with, read_dataset
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer
from llada_jax.training.config import evaluation_block_sizes, phases


@dataclasses.dataclass(frozen=True)
class Component:
    """A dataset of a run. name: in metrics; share: of the training rows; held_out: its part of the held-out rows."""

    name: str
    share: float
    held_out: slice


def open_rows(
    config: ConfigDict,
    sources: Sequence[tuple[str, Fraction]],
    tokenizer: Tokenizer | None,
    ends: Sequence[int] | None = None,
) -> tuple[Order, Batch, tuple[Component, ...]]:
    """Opens the training rows and reads the held-out ones. sources: (folder, share) of each component. ends: the
    model's ends of sequence, among which that of the rows must be; None takes any.

    Of every component the last data.held_out_rows are held out, of which evaluation.rows are read. Raises InputError
    naming the folder that does not fit.
    """
    opened = [_open(config, path, component, tokenizer, ends) for component, (path, _) in enumerate(sources)]
    training = [rows for rows, _ in opened]
    rows = training[0]
    if len(sources) > 1:
        rows = Mixture(training, [share for _, share in sources])
    held_out, components, first_id = [], [], 0
    names = _names([path for path, _ in sources])
    for name, (_, share), (own, apart) in zip(names, sources, opened, strict=True):
        count = min(config.evaluation.rows, len(apart))
        batch = apart.batch(0, count)
        held_out.append(batch.replace(row_ids=batch.row_ids + np.uint32(first_id)))
        begin = components[-1].held_out.stop if components else 0
        components.append(Component(name, float(share), slice(begin, begin + count)))
        first_id += own.stored
    return rows, jax.tree.map(lambda *parts: np.concatenate(parts), *held_out), tuple(components)


def _open(
    config: ConfigDict, path: str, component: int, tokenizer: Tokenizer | None, ends: Sequence[int] | None
) -> tuple[Rows, Rows]:
    """(training rows, held-out rows) of a component."""
    data, dataset = config.data, read_dataset(path)
    stored = dataset["rows"]
    if stored <= data.held_out_rows:
        raise InputError(
            f"{path}: {stored} rows, of which data.held_out_rows={data.held_out_rows} are held out: none is left"
        )
    split = stored - data.held_out_rows
    common = {"expected_length": data.length, "corrupt_share": data.corrupt_share}
    seed = component_seed(config.seed, component) if component else config.seed
    rows = Rows(path, seed, 0, split, **common)
    held_out = Rows(path, config.seed, split, stored, shuffle=False, **common)
    _check_kind(config, path, dataset)
    if tokenizer is not None and not packed_with(dataset, tokenizer):
        raise InputError(f"{path}: packed with another tokenizer than the checkpoint's")
    _check_ends(path, dataset, tokenizer, ends)
    _check_blocks(config, path, dataset)
    return rows, held_out


def _check_ends(path: str, dataset: dict, tokenizer: Tokenizer | None, ends: Sequence[int] | None) -> None:
    """Documents must begin as the run's prompts will, and end in what the model stops at."""
    if ends is not None and (end := dataset.get("eos_id")) is not None and end not in ends:
        raise InputError(f"{path}: documents end in id {end}, which is none of the model's ends of sequence {[*ends]}")
    if tokenizer is None:
        return
    begins, expected = dataset.get("add_bos"), tokenizer.adds_bos
    if begins is None and expected:
        print(
            f"{path}: its documents have no beginning of sequence (packed before --add_bos), prompts will", flush=True
        )
    elif begins not in (None, expected):
        documents, prompts = ("with" if each else "without" for each in (begins, expected))
        raise InputError(
            f"{path}: documents begin {documents} a beginning of sequence, this run's prompts {prompts} one; "
            f"pack with --add_bos={str(expected).lower()}, or set config.data.add_bos={str(begins).lower()}"
        )


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole of it where others have the same."""
    short = [os.path.basename(os.path.normpath(path)) for path in paths]
    count = collections.Counter(short)
    return [name if count[name] == 1 else path for name, path in zip(short, paths, strict=True)]


def _check_kind(config: ConfigDict, path: str, dataset: dict) -> None:
    """Pairs are for DPO and DPO is for pairs: other losses would learn the rejected answers too."""
    kind, dpo = dataset.get("kind", "text"), config.preference
    if (kind == "preference") != dpo.enabled:
        raise InputError(
            f"{path}: rows of --kind={kind}, but config.preference.enabled={dpo.enabled}; DPO, and nothing else, "
            "trains on rows of --kind=preference"
        )
    if dpo.enabled and dataset["max_pairs"] > dpo.max_pairs:
        raise InputError(
            f"config.preference.max_pairs={dpo.max_pairs}: {path} was packed with --max_pairs={dataset['max_pairs']}"
        )


def _check_blocks(config: ConfigDict, path: str, dataset: dict) -> None:
    """Conversations and pairs begin at blocks, as in decoding. Text is cut anywhere: Eq. 3 counts blocks from the row's
    beginning.
    """
    c, align = config.objective, dataset.get("block_align", 1)
    one_each = dataset["documents"] <= dataset["rows"]  # no row has two
    if dataset.get("kind", "text") == "text" or c.block_origin != "global" or not c.document_mask or one_each:
        return
    sizes = {size: "config.evaluation.block_sizes" for size in evaluation_block_sizes(config)}
    sizes |= {phase.block_size: "config.schedule" for phase in phases(config)}
    for size, field in sizes.items():
        if align % size and size < config.data.length:
            raise InputError(
                f"{path}: documents begin at multiples of {align} (--block_align={align}), but {field} has blocks of "
                f"{size}: some begin inside one, as no answer does; pack with --block_align={math.lcm(align, size)}, "
                'or set config.objective.block_origin="document"'
            )
