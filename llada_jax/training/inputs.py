"""What a run starts from: the model, its tokenizer and the rows of data."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.order import Batch, Rows
from llada_jax.data.rows import read_dataset
from llada_jax.errors import InputError
from llada_jax.interop.tokenizer import Tokenizer, load_tokenizer
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig, preset
from llada_jax.model.lora import Lora
from llada_jax.training import checkpoint, hosts
from llada_jax.training.lora import open_lora
from llada_jax.training.source import Source, open_source


@dataclasses.dataclass(frozen=True)
class Inputs:
    """model: the resolved values; lora: its adapters, when they are what trains; source: the checkpoint to start from,
    or None for random weights.
    """

    model: ModelConfig
    lora: Lora | None
    tokenizer: Tokenizer | None
    source: Source | None
    rows: Rows
    held_out: Batch

    @property
    def trained(self) -> ModelConfig | Lora:
        return self.lora or self.model


def open_inputs(config: ConfigDict, workdir: Path) -> Inputs:
    """Reads configs and opens data, no weights yet. Raises InputError naming what is missing or does not fit."""
    source = open_source(config.init_from) if config.init_from else None
    model, tokenizer = _model(config, source)
    lora = open_lora(config, model, source.directory) if config.lora.rank else None
    path = _dataset(config, workdir, tokenizer)
    data = config.data
    stored = read_dataset(path)["rows"]
    if stored <= data.held_out_rows:
        raise InputError(
            f"{path}: {stored} rows, of which data.held_out_rows={data.held_out_rows} are held out: none is left"
        )
    split = stored - data.held_out_rows
    rows = Rows(path, config.seed, 0, split, expected_length=data.length)
    _check_kind(config, path, rows.dataset)
    held_out = Rows(path, config.seed, split, stored, shuffle=False, expected_length=data.length)
    if (tokenizer is not None) and rows.dataset["tokenizer_digest"] != tokenizer.digest:
        raise InputError(f"{path}: packed with another tokenizer than the checkpoint's")
    held_out = held_out.batch(0, min(config.evaluation.rows, len(held_out)))
    return Inputs(model, lora, tokenizer, source, rows, held_out)


def initial_params(inputs: Inputs, seed: int, shardings):
    """What trains, float32: the weights of the source, or random ones drawn on the devices, as adapters always are."""
    if inputs.source is not None and inputs.lora is None:
        return checkpoint.load_params(inputs.source.directory, dtype="float32", shardings=shardings)
    key = jax.random.key(seed, impl="threefry2x32")

    def draw(bits):
        return parameters.initialize(inputs.trained, jax.random.wrap_key_data(bits, impl="threefry2x32"))

    # On several processes an argument lies on all of their devices, or in numpy.
    return jax.jit(draw, out_shardings=shardings)(np.asarray(jax.random.key_data(key)))


def frozen_params(inputs: Inputs, mesh):
    """The weights of the source when they do not train: LoRA's base as it is stored, any other reference in float32."""
    where = sharding.shardings(parameters.abstract(inputs.model), parameters.logical_axes(inputs.model), mesh)
    dtype = None if inputs.lora else "float32"
    return checkpoint.load_params(inputs.source.directory, dtype=dtype, shardings=where)


def lineage(config: ConfigDict, inputs: Inputs) -> dict:
    """What the checkpoints of the run say of where they come from: the run itself, and all stages before it."""
    found = {"config": json.loads(config.to_json())}
    if inputs.source is not None:
        found |= {"init_from": str(config.init_from), "loaded": inputs.source.record(), "source": inputs.source.lineage}
    return found


def _model(config: ConfigDict, source: Source | None) -> tuple[ModelConfig, Tokenizer | None]:
    expected = preset(config.model)
    tokenizer = None
    model = expected
    if source is not None:
        model = source.model
        for field in ("architecture", "hidden_size", "num_layers", "num_heads", "num_experts"):
            if getattr(model, field) != getattr(expected, field):
                raise InputError(
                    f"config.init_from={config.init_from}: {field}={getattr(model, field)!r}, "
                    f"but model {config.model!r} has {getattr(expected, field)!r}"
                )
        tokenizer = checkpoint.load_tokenizer(source.directory)
    elif config.data.tokenizer == "bytes":
        if expected.vocab_size < 258 or None in (expected.eos_token_id, expected.mask_token_id):
            raise InputError(f'config.data.tokenizer="bytes" does not fit model {config.model!r}')
        tokenizer = byte_tokenizer(expected.eos_token_id, expected.mask_token_id)
    elif config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
        mask_id = expected.mask_token_id if tokenizer.mask_id is None else tokenizer.mask_id
        model = model.replace(mask_token_id=mask_id, eos_token_id=tokenizer.eos_id)
    if config.alignment:
        model = model.replace(alignment=config.alignment)
    if config.schedule.kind == "ar" and model.alignment != "shifted":
        raise InputError(f'config.alignment={model.alignment!r}: an AR model predicts the next token, set "shifted"')
    if config.schedule.kind != "ar" and model.mask_token_id is None:
        raise InputError(
            f"{config.init_from or config.data.tokenizer or config.model}: no mask token; import the checkpoint with "
            "--mask_token_id=N or --add_mask_token"
        )
    return model, tokenizer


def _check_kind(config: ConfigDict, path: str, dataset: dict):
    """Pairs are for DPO and DPO is for pairs: other losses would learn the rejected answers too."""
    kind, wanted = dataset.get("kind", "text"), config.preference
    if (kind == "preference") != wanted.enabled:
        raise InputError(
            f"{path}: rows of --kind={kind}, but config.preference.enabled={wanted.enabled}; DPO, and nothing else, "
            "trains on rows of --kind=preference"
        )
    if wanted.enabled and dataset["max_pairs"] > wanted.max_pairs:
        raise InputError(
            f"config.preference.max_pairs={wanted.max_pairs}: {path} was packed with --max_pairs={dataset['max_pairs']}"
        )


def _dataset(config: ConfigDict, workdir: Path, tokenizer: Tokenizer | None) -> str:
    """Folder of packed rows; raw text is packed into the cache once, under a digest of what went in."""
    data = config.data
    if bool(data.path) == bool(data.source):
        raise InputError(f"config.data: set one of path={data.path!r} and source={data.source!r}")
    if data.path:
        return data.path
    if tokenizer is None:
        raise InputError('config.data.tokenizer: packing data.source needs a tokenizer: a folder, or "bytes"')
    from llada_jax.data.pack import pack  # parquet and jsonl readers are not needed when the rows exist
    from llada_jax.data.sources import list_files

    files = [(file.name, file.bytes) for file in list_files(data.source, patterns=data.patterns)]
    settings = json.dumps([files, data.length, tokenizer.digest]).encode()
    cache = Path(data.cache) if data.cache else workdir / "data"
    out = cache / hashlib.sha256(settings).hexdigest()[:16]
    log = sys.stderr if jax.process_index() == 0 else None
    hosts.in_turn(lambda: pack(data.source, tokenizer, str(out), data.length, patterns=data.patterns, log=log))
    return str(out)
