"""What a run starts from: the model, its tokenizer and the rows of data."""

import dataclasses
import hashlib
import json
import sys
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.checkpoint import weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.mixture import parse_mixture
from llada_jax.data.order import Batch, Order
from llada_jax.data.rows import FORMAT
from llada_jax.errors import InputError
from llada_jax.evaluation.questions import Question
from llada_jax.interop.export import check_exportable
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.reinforcement.questions import Questions, open_questions
from llada_jax.runtime import distributed
from llada_jax.tokenizer import Tokenizer, load_tokenizer, parse_add_bos
from llada_jax.training import run_model
from llada_jax.training.config import extended
from llada_jax.training.datasets import Component, open_rows
from llada_jax.training.lora import open_lora
from llada_jax.training.source import Source, open_source


@dataclasses.dataclass(frozen=True)
class Inputs:
    """model: the resolved values; lora: its adapters, when they are what trains; source: the checkpoint to start from,
    or None for random weights; components: the datasets of the rows, with their parts of held_out. A run of
    reinforcement learning has questions for rows.
    """

    model: ModelConfig
    lora: Lora | None
    tokenizer: Tokenizer | None
    source: Source | None
    rows: Order | Questions
    held_out: Batch | list[Question]
    components: tuple[Component, ...]

    @property
    def num_held_out(self) -> int:
        return len(self.held_out) if isinstance(self.held_out, list) else len(self.held_out.ids)

    @property
    def documents(self) -> np.ndarray | None:
        """Segment ids of the held-out rows, [rows, length]; None of questions."""
        return None if isinstance(self.held_out, list) else self.held_out.segment_ids

    @property
    def trained(self) -> ModelConfig | Lora:
        return self.lora or self.model


def open_inputs(config: ConfigDict, workdir: Path) -> Inputs:
    """Reads configs and opens data, no weights yet. Raises InputError naming what is missing or does not fit."""
    source = open_source(config.init_from) if config.init_from else None
    model, tokenizer = _model(config, source)
    lora = open_lora(config, model, source.directory) if config.lora.rank else None
    if config.rl.enabled:
        questions = _questions(config, tokenizer)
        return Inputs(model, lora, tokenizer, source, questions, questions.held_out, ())
    rows, held_out, components = open_rows(
        config, _datasets(config, workdir, tokenizer), tokenizer, model.eos_token_ids
    )
    return Inputs(model, lora, tokenizer, source, rows, held_out, components)


def describe_rows(config: ConfigDict, inputs: Inputs) -> str:
    """The rows of the run, or its questions, in words."""
    if not config.rl.enabled:
        return f"{len(inputs.rows):,} rows of {config.data.length} tokens, {inputs.num_held_out} held out"
    c = config.rl
    return (
        f"questions of {c.questions}, {inputs.num_held_out} held out, {c.group} answers to each, of at most "
        f"{c.gen_length} tokens; estimator {c.estimator}"
    )


def initial_params(inputs: Inputs, seed: int, shardings):
    """What trains, float32: the weights of the source, or random ones drawn on the devices, as adapters always are."""
    if inputs.source is not None and inputs.lora is None:
        return weights.load_params(inputs.source.directory, dtype="float32", shardings=shardings)
    key = jax.random.key(seed, impl="threefry2x32")

    def draw(bits):
        return parameters.initialize(inputs.trained, jax.random.wrap_key_data(bits, impl="threefry2x32"))

    # On several processes an argument lies on all of their devices, or in numpy.
    return jax.jit(draw, out_shardings=shardings)(np.asarray(jax.random.key_data(key)))


def frozen_params(inputs: Inputs, mesh):
    """The weights of the source when they do not train: LoRA's base as it is stored, any other reference in float32."""
    shardings = sharding.shardings(parameters.abstract(inputs.model), parameters.logical_axes(inputs.model), mesh)
    dtype = None if inputs.lora else "float32"
    return weights.load_params(inputs.source.directory, dtype=dtype, shardings=shardings)


def lineage(config: ConfigDict, inputs: Inputs) -> dict:
    """What the checkpoints of the run say of where they come from: the run itself, and all stages before it."""
    recorded = {"config": json.loads(config.to_json())}
    if inputs.source is not None:
        recorded |= {
            "init_from": str(config.init_from),
            "loaded": inputs.source.record(),
            "source": inputs.source.lineage,
        }
    return recorded


def _model(config: ConfigDict, source: Source | None) -> tuple[ModelConfig, Tokenizer | None]:
    tokenizer = None
    model = run_model.named(config) if source is None else source.model
    if source is not None:
        run_model.check_preset(config, model)
        tokenizer = weights.load_tokenizer(source.directory)
    elif config.data.tokenizer == "bytes":
        if model.vocab_size < 258 or None in (model.eos_token_id, model.mask_token_id):
            raise InputError(f'config.data.tokenizer="bytes" does not fit model {config.model!r}')
        tokenizer = byte_tokenizer(model.eos_token_id, model.mask_token_id)
    elif config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
        mask_id = model.mask_token_id if tokenizer.mask_id is None else tokenizer.mask_id
        model = model.replace(mask_token_id=mask_id, eos_token_id=tokenizer.eos_id)
        model = model.with_ends(i for i in tokenizer.eos_ids if i < model.vocab_size)
    if tokenizer is not None:
        tokenizer = _checked(config, model, tokenizer)
    if config.alignment:
        model = model.replace(alignment=config.alignment)
    model = extended(config, model)
    if source is not None and model.rope_scaling != source.model.rope_scaling:
        check_exportable(model, source.lineage)
    if config.schedule.kind == "ar" and model.alignment != "shifted":
        raise InputError(f'config.alignment={model.alignment!r}: an AR model predicts the next token, set "shifted"')
    if config.schedule.kind != "ar" and model.mask_token_id is None:
        raise InputError(
            f"{config.init_from or config.data.tokenizer or config.model}: no mask token; import the checkpoint with "
            "--mask_token_id=N or --add_mask_token"
        )
    if config.editing.replace_high and tokenizer is None:
        raise InputError(
            f"config.editing.replace_high={config.editing.replace_high}: which ids texts have is not known without a "
            "tokenizer; set config.data.tokenizer or config.init_from"
        )
    if config.editing.labels == "levenshtein" and None in (model.delete_token_id, model.insert_token_id):
        raise InputError(
            f'config.editing.labels="levenshtein": {config.init_from or config.model} has no tokens that delete and '
            "insert (delete_token_id, split_token_id of LLaDA2.2)"
        )
    return model, tokenizer


def _checked(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that begins documents as the run asks for. Raises InputError when the model would not stop at the
    end of sequence that they end in.
    """
    try:
        add_bos = parse_add_bos(config.data.add_bos)
        tokenizer = tokenizer if add_bos == "auto" else tokenizer.with_bos(add_bos)
    except InputError as error:
        raise InputError(f"config.data.{error}") from error
    if tokenizer.eos_id not in (None, *model.eos_token_ids):
        raise InputError(
            f"{config.init_from or config.data.tokenizer}: documents end in {tokenizer.special_tokens['eos_token']!r} "
            f"(id {tokenizer.eos_id}), at which the model does not stop: its ends of sequence are "
            f"{list(model.eos_token_ids)}; import it again"
        )
    return tokenizer


def _datasets(config: ConfigDict, workdir: Path, tokenizer: Tokenizer | None) -> list[tuple[str, Fraction]]:
    """Folders of packed rows with their shares."""
    data = config.data
    if [data.path, data.source, data.mixture].count("") != 2:
        raise InputError(
            f"config.data: set one of path={data.path!r}, source={data.source!r} and mixture={data.mixture!r}"
        )
    if data.mixture:
        return parse_mixture(data.mixture)
    return [(data.path or _packed(config, workdir, tokenizer), Fraction(1))]


def _questions(config: ConfigDict, tokenizer: Tokenizer | None) -> Questions:
    """Of a run of reinforcement learning."""
    c = config.rl
    if tokenizer is None:
        raise InputError(f"{config.init_from}: no tokenizer, which questions need")
    try:
        settings = json.loads(c.settings)
    except json.JSONDecodeError as error:
        raise InputError(f"config.rl.settings={c.settings!r}: no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise InputError(f"config.rl.settings={c.settings!r}, expected a JSON object")
    return open_questions(c.questions, settings, config.seed, c.held_out, tests=c.reward == "code")


def _packed(config: ConfigDict, workdir: Path, tokenizer: Tokenizer | None) -> str:
    """Raw text is packed into the cache once, under a digest of all that the rows depend on: the contents of the files,
    the tokenizer, the shape. Every start of a run reads the files for it. Returns the folder.
    """
    data = config.data
    if tokenizer is None:
        raise InputError('config.data.tokenizer: packing data.source needs a tokenizer: a folder, or "bytes"')
    from llada_jax.data.pack import pack  # parquet and jsonl readers are not needed when the rows exist
    from llada_jax.data.sources import content_digest, list_files

    contents = content_digest(list_files(data.source, patterns=data.patterns))
    begins = ["add_bos"] if tokenizer.adds_bos else []
    made_of = [FORMAT, contents, list(data.patterns), data.length, tokenizer.digest, *begins]
    made_of = json.dumps(made_of).encode()
    cache = Path(data.cache) if data.cache else workdir / "data"
    out = cache / hashlib.sha256(made_of).hexdigest()[:16]
    log = sys.stderr if jax.process_index() == 0 else None

    def pack_once():
        if not (out / "dataset.json").exists():
            pack(data.source, tokenizer, str(out), data.length, patterns=data.patterns, log=log)

    distributed.in_turn(pack_once)
    return str(out)
