"""Import: a Hugging Face folder or a GGUF file becomes a checkpoint, with a mask token where one is known or added."""

import dataclasses
import functools
import os
import re
import time

import numpy as np
from etils import epath

from llada_jax import tokenizer
from llada_jax.checkpoint import weights
from llada_jax.checkpoint.stream import Leaf, identity_of, slabs
from llada_jax.errors import InputError
from llada_jax.folder import file_in, local_path
from llada_jax.interop import config_keys, gguf, hf_config, huggingface, tied_head
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig

CONVERTER_VERSION = 1
# LLaDA2's padded vocabulary and mask; in Ling's chat tokenizer the same id is <|role_end|>.
_LLADA2_VOCAB, _LLADA2_MASK = 157_184, 156_895


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A model to import, described from headers and metadata; only a tied model's stored head is read in full."""

    config: ModelConfig
    hf: dict  # config.json, unchanged
    tensors: dict[str, huggingface.StoredTensor]
    tokenizer_files: dict[str, bytes]
    paths: list[epath.Path]
    notices: list[str]


@dataclasses.dataclass(frozen=True)
class MaskChoice:
    """The mask token chosen (config.mask_token_id, perhaps None) and what it changes."""

    config: ModelConfig
    tokenizer_files: dict[str, bytes]
    appended: bool  # the embedding and the head grow by one row
    notices: list[str]


def import_checkpoint(
    source: str,
    out: str,
    dtype: str | None = None,
    alignment: str | None = None,
    mask_token_id: int | None = None,
    add_mask_token: bool = False,
) -> None:
    """Converts `source` to a checkpoint at `out` and prints a summary.

    source: a Hugging Face folder, hf://OWNER/NAME, or a .gguf file.
    dtype: "float32" or "bfloat16"; by default each tensor keeps its stored dtype. A float32 expert bias is never cast.
    alignment: "same" or "shifted", the token that a position predicts; by default that of the architecture.
    mask_token_id, add_mask_token: the mask of a model that has none; see `choose_mask`.

    Raises InputError, naming the file, tensor or flag, before anything is written.

    Example:
        >>> import llada_jax
        >>> llada_jax.import_checkpoint("hf", "imported", dtype="bfloat16")
        imported: llama, 918,656 parameters, bfloat16, alignment same, mask token id 511, ... s
    """
    begun = time.monotonic()
    target = None if dtype is None else huggingface.parse_dtype(dtype)
    _check_flags(alignment, mask_token_id, add_mask_token)
    model = read_model(source)
    plans = huggingface.plan_leaves(model.tensors, model.config)
    config = model.config if alignment is None else model.config.replace(alignment=alignment)
    mask = choose_mask(config, model.tokenizer_files, mask_token_id, add_mask_token)
    notices = [*model.notices, *mask.notices]
    for notice in notices:
        print(f"notice: {notice}")
    leaves = huggingface.leaves(plans, target)
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    lineage = {
        "source": source if "://" in source else os.path.abspath(source),
        "source_files": {path.name: path.stat().length for path in model.paths},
        "converter_version": CONVERTER_VERSION,
        "dtype": dtypes,
        "hf_config": model.hf,
        "notices": notices,
    }
    weights.write_leaves(
        out,
        mask.config,
        [with_mean_row(leaf) for leaf in leaves] if mask.appended else leaves,
        mask.tokenizer_files,
        lineage,
        identity=identity_of(CONVERTER_VERSION, [(str(path), path.stat().mtime) for path in model.paths]),
    )
    c = mask.config
    print(
        f"{out}: {c.architecture}, {parameters.count(c):,} parameters, {' and '.join(dtypes)}, "
        f"alignment {c.alignment}, mask token id {c.mask_token_id}, {time.monotonic() - begun:.1f} s"
    )


def _check_flags(alignment, mask_token_id, add_mask_token) -> None:
    if alignment not in (None, "same", "shifted"):
        raise InputError(f"--alignment={alignment}, expected same or shifted")
    if mask_token_id is not None and add_mask_token:
        raise InputError("--mask_token_id and --add_mask_token exclude each other")


# --- the source ----------------------------------------------------------------------------------------------------


def read_model(source: str) -> ImportedModel:
    """Opens and checks a source. Raises InputError naming the wrong file or field."""
    path = local_path(source)
    if path.is_file() and path.suffix == ".gguf":
        return _read_gguf(path)
    if path.is_file():
        raise InputError(f"{source}: expected a folder with config.json, or a .gguf file")
    if not path.is_dir():
        raise InputError(f"{source}: no such folder or file (of the hub: --source=hf://OWNER/NAME)")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{source}: adapter_config.json: an adapter, not a model; merge it into its base first")
        ggufs = sorted(path.glob("*.gguf"))
        raise InputError(f"{source}: no config.json" + (f"; pass the file {ggufs[0].name} instead" if ggufs else ""))
    return _read_folder(path)


def _read_folder(folder: epath.Path) -> ImportedModel:
    hf = _read_json(folder, "config.json")
    generation = _read_json(folder, "generation_config.json")
    ends = hf_config.ends_of_sequence(hf, generation)
    config = hf_config.from_hf(hf | {"eos_token_id": ends} if ends else hf)
    tensors = huggingface.open_tensors(folder)
    predictors = hf.get("num_nextn_predict_layers") or 0
    tensors, notices = huggingface.drop_unused(tensors, config, predictors)
    tensors, config, said = tied_head.settle(tensors, config)
    notices += said
    if unknown := config_keys.check(hf, config.architecture):
        values = ", ".join(f"{key}={_short(hf[key])}" for key in unknown)
        notices.append(f"config.json: unknown keys, ignored: {values}")
    files = tokenizer.read_files(folder)
    if not files:
        notices.append(f"no tokenizer.json in {folder}: the checkpoint will have no tokenizer")
    paths = [folder / "config.json", *huggingface.find_weights(folder)[0]]
    return ImportedModel(config, hf, tensors, files, paths, notices)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _read_gguf(path: epath.Path) -> ImportedModel:
    file = gguf.open_gguf(path)
    config = gguf.model_config(file)
    files = gguf.tokenizer_files(file)
    return ImportedModel(config, hf_config.to_hf(config), gguf.hf_tensors(file, config), files, file.parts, [])


def _read_json(folder: epath.Path, name: str) -> dict:
    path = file_in(folder, name)
    try:
        return tokenizer.read_json({name: path.read_bytes()} if path.is_file() else {}, name, str(folder))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


# --- the mask token ------------------------------------------------------------------------------------------------


def choose_mask(config: ModelConfig, files: dict[str, bytes], mask_token_id: int | None, add: bool) -> MaskChoice:
    """Chooses the mask token of an imported model and records it in the tokenizer's files.

    The first of these that exists: the tokenizer's own mask token; `mask_token_id` or that of config.json; LLaDA2's
    known id, if there is no tokenizer; with `add`, the first id of the padded embedding that the tokenizer does not
    use, else one new row; no mask token. The config also takes the tokenizer's ends of sequence and, if it has none,
    its pad token. Raises InputError if two of these disagree, or if an id is out of range or names another token.
    """
    names = tokenizer.from_files(files) if files else None
    config, notices = _with_special_ids(config, names)
    declared, source = _declared_mask(config, names, notices)
    if declared is not None and mask_token_id not in (None, declared):
        raise InputError(f"--mask_token_id={mask_token_id}, but {source} says that the mask token is {declared}")
    chosen = declared if mask_token_id is None else mask_token_id
    if chosen is not None:
        _check_mask_id(config, names, chosen, source if mask_token_id is None else "--mask_token_id")
        if add:
            notices.append(f"no mask token added: {source} has one, id {chosen}")
        elif names is None and chosen == _LLADA2_MASK and source is None:
            notices.append(f"no tokenizer to check id {chosen}: <|mask|> in LLaDA2, <|role_end|> in Ling's chat models")
    appended = False
    if chosen is None and add:
        used = set(range(config.vocab_size)) if names is None else set(names.backend.get_vocab().values())
        chosen = next((i for i in range(config.vocab_size) if i not in used), config.vocab_size)
        appended = chosen == config.vocab_size
        _check_mask_name(names, chosen, "--add_mask_token")
        what = "appended to the embedding" if appended else "an id that the tokenizer does not use"
        notices.append(f"mask token {chosen}: {what}")
    if chosen is None:
        notices.append("no mask token: --mask_token_id=N or --add_mask_token gives one; without, only `forward` works")
    elif files and names.mask_id is None:
        files = tokenizer.with_mask(files, chosen)
    vocab_size = config.vocab_size + int(appended)
    return MaskChoice(config.replace(vocab_size=vocab_size, mask_token_id=chosen), files, appended, notices)


def _with_special_ids(config: ModelConfig, names: tokenizer.Tokenizer | None) -> tuple[ModelConfig, list[str]]:
    if names is None:
        return config, []
    last = max(names.backend.get_vocab().values())
    notices = []
    if last >= config.vocab_size:
        notices.append(f"the tokenizer has ids up to {last}, the embedding only {config.vocab_size} rows")
    if config.pad_token_id is None and names.pad_id is not None and names.pad_id < config.vocab_size:
        config = config.replace(pad_token_id=names.pad_id)
    return config.with_ends(i for i in names.eos_ids if i < config.vocab_size), notices


def _declared_mask(config: ModelConfig, names, notices: list[str]) -> tuple[int | None, str | None]:
    """(id, where it is declared) of the source's own mask token; (None, None) without one."""
    own = None if names is None else names.mask_id
    if own is not None:
        if config.mask_token_id not in (None, own):
            raise InputError(f"config.json: mask_token_id={config.mask_token_id}, but the tokenizer's mask is {own}")
        return own, "the tokenizer"
    if config.mask_token_id is not None:
        return config.mask_token_id, "config.json"
    if config.architecture == "llada2_moe" and config.vocab_size == _LLADA2_VOCAB:
        if names is None:
            notices.append(f"no tokenizer: mask token id {_LLADA2_MASK}, as LLaDA2's tokenizers have it, is assumed")
            return _LLADA2_MASK, "the LLaDA2 vocabulary"
        name = names.id_to_token(_LLADA2_MASK)
        notices.append(f"not LLaDA2's tokenizer: id {_LLADA2_MASK}, LLaDA2's mask, is {name!r} in it")
    return None, None


def _check_mask_id(config: ModelConfig, names, mask_id: int, source: str) -> None:
    if not 0 <= mask_id < config.vocab_size:
        raise InputError(f"{source}: mask token id {mask_id} is not below vocab_size={config.vocab_size}")
    _check_mask_name(names, mask_id, source)


def _check_mask_name(names: tokenizer.Tokenizer | None, mask_id: int, source: str) -> None:
    name = None if names is None else names.id_to_token(mask_id)
    # "[gMASK]" is another thing: it marks where generation begins.
    if name is not None and mask_id != names.mask_id and not re.search(r"(?<![a-z])mask(?![a-z])", name.lower()):
        raise InputError(
            f"{source}: id {mask_id} is {name!r} in this tokenizer, not a mask; use --add_mask_token or an unused id"
        )


def with_mean_row(leaf: Leaf) -> Leaf:
    """Appends a row to the embedding, or a column to the head: the mean of the existing ones. Others are unchanged.

    AR training drives the rows of unused ids towards zero; the mean keeps the scale that the norms expect.
    """
    if leaf.name not in ("embedding", "head"):
        return leaf
    axis, size = leaf.axis, leaf.shape[leaf.axis]

    @functools.cache
    def mean() -> np.ndarray:
        bounds = slabs(leaf.shape, leaf.dtype.itemsize, axis)
        total = sum(np.sum(leaf.read(*each), axis, np.float32, keepdims=True) for each in bounds)
        return (total / np.float32(size)).astype(leaf.dtype)

    def read(first, last):
        if last <= size:
            return leaf.read(first, last)
        return np.concatenate([leaf.read(first, size), mean()], axis) if first < size else mean()

    shape = (*leaf.shape[:axis], size + 1, *leaf.shape[axis + 1 :])
    return dataclasses.replace(leaf, shape=shape, read=read)
