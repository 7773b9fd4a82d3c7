"""Describes a checkpoint in lines of text: its tensors, its step and its lineage. Reads no weights."""

import base64
import json
import math
from collections.abc import Iterator

from etils import epath

from llada_jax.checkpoint import files, weights
from llada_jax.model.config import ModelConfig


def describe_checkpoint(directory: epath.Path) -> Iterator[str]:
    """Yields lines of text. Raises InputError naming what is missing or damaged."""
    digests = files.read_digests(directory)
    stored, header = weights.read_stored_config(directory), weights.read_header(directory)
    model = stored if isinstance(stored, ModelConfig) else stored.model
    yield f"checkpoint {directory}, sha256 {digests.sha256}"
    yield f"model: {model.architecture}, alignment {model.alignment}, mask token id {model.mask_token_id}"
    if model is not stored:
        yield f"adapters: rank {stored.rank}, alpha {stored.alpha} on {', '.join(stored.targets)} of {stored.base}"
    if "train_state.json" in digests.files:
        state = json.loads(files.read_file(directory, digests, "train_state.json"))
        yield f"step {state['step']}" + ("" if state.get("score") is None else f", score {state['score']:.6g}")
    yield f"written by {header.get('code', 'an unknown version')}"
    yield from _lineage(header["lineage"])
    yield f"files: {', '.join(digests.files)}"
    for folder, entries in digests.tensors.items():
        if entries:
            yield ""
            yield from _table(folder, entries, _shardings(directory / folder))


def _lineage(lineage: dict) -> Iterator[str]:
    """One line per stage, the last one first."""
    while lineage:
        source = lineage.get("source")
        if "config" in lineage:
            loaded = lineage.get("loaded") or {}
            start = f" from {lineage['init_from']} {_short(loaded)}" if "init_from" in lineage else " from scratch"
            yield f"trained: stage {lineage['config'].get('stage') or 'without a name'}{start}"
            yield f"  config {json.dumps(lineage['config'], sort_keys=True, default=str)}"
        elif "merged" in lineage:
            yield f"mean of {', '.join(lineage['merged'])}"
        elif isinstance(source, str):
            yield f"imported from {source}, dtype {' and '.join(lineage.get('dtype', []))}"
            yield from (f"  notice: {notice}" for notice in lineage.get("notices", []))
        lineage = source if isinstance(source, dict) else {}


def _short(values: dict) -> str:
    return f"({', '.join(f'{key} {value}' for key, value in values.items())})" if values else ""


def _table(folder: str, entries: dict[str, files.TensorEntry], shardings: dict[str, str]) -> Iterator[str]:
    rows = [("tensor", "shape", "dtype", "bytes", "digest", "sharding")]
    for name, entry in entries.items():
        shape = "[" + ", ".join(map(str, entry.shape)) + "]"
        sharding = shardings.get(name, "")
        rows.append((f"{folder}/{name}", shape, entry.dtype.name, f"{entry.nbytes:,}", entry.digest, sharding))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        left = f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:{widths[2]}}"
        yield f"{left}  {row[3]:>{widths[3]}}  {row[4]:{widths[4]}}  {row[5]}".rstrip()
    elements, size = (sum(f(e) for e in entries.values()) for f in (lambda e: math.prod(e.shape), lambda e: e.nbytes))
    yield f"total: {len(entries)} tensors, {elements:,} elements, {size:,} bytes ({size / 2**30:.2f} GiB)"


def _shardings(folder: epath.Path) -> dict[str, str]:
    """{tensor: its sharding when it was saved}, from the file that Orbax writes; {} without one."""
    path = folder / "_sharding"
    if not path.exists():
        return {}
    shardings = {}
    for name, text in json.loads(path.read_text()).items():
        value = json.loads(text)
        mesh = ", ".join(f"{a}={n}" for a, n in zip(value.get("axis_names", []), value.get("shape", []), strict=False))
        spec = value.get("partition_spec", value.get("sharding_type"))
        shardings[base64.b64decode(name).decode()] = f"{json.dumps(spec)}" + (f" on {mesh}" if mesh else "")
    return shardings
