"""Reads GGUF files (llama.cpp): ModelConfig, tensors under their Hugging Face names, and the tokenizer's files.

A metadata key of the architecture is read, harmless, or refused: none that changes llama.cpp's forward pass is dropped.
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import gguf
import numpy as np

from llada_jax.errors import InputError
from llada_jax.interop.stored_tensor import StoredTensor
from llada_jax.model.config import ModelConfig, RopeScaling

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]},
}
_ENDS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]  # each ends an answer of llama.cpp
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_READ = """
    context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.layer_norm_rms_epsilon rope.freq_base rope.scaling.type rope.scaling.factor
    rope.scale_linear
""".split()
# Those of YaRN only count with that type, which is refused; vocab_size is that of the embedding.
_HARMLESS = """
    vocab_size tensor_data_layout expert_used_count rope.scaling.original_context_length rope.scaling.finetuned
    rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    rope.scaling.yarn_log_multiplier
""".split()
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF model: one file, or all parts of a split one. `fields`: its metadata, {key: value}."""

    path: Path
    fields: dict
    tensors: list[gguf.ReaderTensor]
    parts: list[Path]


def open_gguf(path: Path) -> GgufFile:
    """Opens a GGUF model; of a split one (NAME-00001-of-00003.gguf), `path` is any part and all parts are opened.

    Raises InputError if a part is missing, truncated or malformed, or if the architecture is not llama.
    """
    fields, tensors = _open_part(path)
    count, parts = fields.get("split.count", 1), [path]
    if isinstance(count, int) and count > 1:
        parts = _parts(path, count)
        opened = [_open_part(part) for part in parts]
        for number, (each, _) in enumerate(opened):
            if each.get("split.no", number) != number:
                raise InputError(f"{parts[number]}: split.no={each['split.no']}, expected {number}")
        fields = opened[0][0]
        tensors = [tensor for _, each in opened for tensor in each]
        expected = fields.get("split.tensors.count", len(tensors))
        if len(tensors) != expected:
            raise InputError(f"{path}: its {count} parts have {len(tensors)} tensors, expected {expected}")
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: tensor {next(name for name in names if names.count(name) > 1)} is there twice")
    for key, expected in {"general.architecture": "llama", "general.type": "model"}.items():
        if fields.get(key, "model" if key == "general.type" else None) != expected:
            raise InputError(f"{path}: {key}={fields.get(key)!r} is not supported; supported: {expected}")
    return GgufFile(path, fields, tensors, parts)


def _open_part(path: Path) -> tuple[dict, list[gguf.ReaderTensor]]:
    try:
        reader = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
    except Exception as error:  # a truncated file fails wherever the reader has got to
        if "GGMLQuantizationType" in str(error):
            raise InputError(f"{path}: a tensor's type is unknown to the package gguf ({error})") from error
        raise InputError(f"{path}: not a complete GGUF file ({type(error).__name__}: {error})") from error


def _parts(path: Path, count: int) -> list[Path]:
    match = _PART.search(path.name)
    if not match or int(match[2]) != count:
        raise InputError(f"{path}: one of {count} parts, expected the name NAME-00001-of-{count:05d}.gguf")
    stem = path.name[: match.start()]
    parts = [path.parent / f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError(f"{part}: missing; split.count={count} in {path.name}")
    return parts


def model_config(file: GgufFile) -> ModelConfig:
    """ModelConfig from the metadata. Raises InputError naming a key that is missing or not supported."""
    names = {tensor.name for tensor in file.tensors}
    heads = _size(file, "llama.attention.head_count")
    head_dim = _size(file, "llama.attention.key_length", _size(file, "llama.embedding_length") // heads)
    _refuse_unsupported(file, head_dim)
    if "rope_freqs.weight" in names:
        raise InputError(f"{file.path}: rope_freqs.weight (rescaled rotary frequencies) is not supported")
    embedding = next((tensor for tensor in file.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise InputError(f"{file.path}: missing tensor token_embd.weight")
    return ModelConfig(
        architecture="llama",
        vocab_size=int(embedding.shape[-1]),  # GGUF lists the fastest dimension first
        hidden_size=_size(file, "llama.embedding_length"),
        num_layers=_size(file, "llama.block_count"),
        num_heads=heads,
        num_kv_heads=_size(file, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_size(file, "llama.feed_forward_length"),
        rms_norm_eps=_number(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_number(file, "llama.rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(file),
        max_position_embeddings=_size(file, "llama.context_length"),
        tie_word_embeddings="output.weight" not in names,
        alignment="shifted",
        pad_token_id=file.fields.get("tokenizer.ggml.padding_token_id"),
    ).with_ends(file.fields[key] for key in _ENDS if key in file.fields)


def _refuse_unsupported(file: GgufFile, head_dim: int) -> None:
    expected = {
        "rope.dimension_count": (head_dim,),
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "rope.scaling.attn_factor": (1.0,),
        "logit_scale": (0.0, 1.0),
        "residual_scale": (0.0, 1.0),
        "embedding_scale": (0.0, 1.0),
    }
    for key, value in file.fields.items():
        name = key.removeprefix("llama.")
        if name == key or name in _READ or name in _HARMLESS:
            continue
        if value not in expected.get(name, (0, "", [])):
            raise InputError(f"{file.path}: {key}={value!r} is not supported")


def _rope_scaling(file: GgufFile) -> RopeScaling | None:
    """The scaling as llama.cpp reads it: the old key if there is no new one; linear if there is no type."""
    kind = file.fields.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise InputError(f"{file.path}: llama.rope.scaling.type={kind!r} is not supported; supported: none, linear")
    key = "llama.rope.scaling.factor"
    factor = _number(file, key if key in file.fields else "llama.rope.scale_linear", 0.0)
    return None if kind == "none" or factor in (0.0, 1.0) else RopeScaling("linear", factor)


def _get(file: GgufFile, key: str, default=None):
    value = file.fields.get(key, default)
    if value is None:
        raise InputError(f"{file.path}: metadata {key} is missing")
    return value


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    value = _get(file, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:  # a list has one value for each layer
        raise InputError(f"{file.path}: {key}={value!r} is not supported, expected a positive integer")
    return value


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    """A float32 value as the shortest decimal that rounds to it, which is what the author wrote."""
    value = _get(file, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{file.path}: {key}={value!r} is not supported, expected a number")
    return float(str(np.float32(value)))


def hf_tensors(file: GgufFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """Tensors under their Hugging Face names and shapes, dequantised to float32 when they are read.

    Raises InputError naming a tensor that no llama model has, or whose type cannot be dequantised.
    """
    tensors = {}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for tensor in file.tensors:
        name, kind = _hf_name(file, tensor.name)
        try:
            gguf.quants.dequantize(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            quantised = f"{tensor.name} is of type {tensor.tensor_type.name}"
            raise InputError(f"{file.path}: {quantised}, which the package gguf cannot dequantise") from error
        shape = tuple(int(n) for n in reversed(tensor.shape))
        read = functools.partial(_read, tensor, shape, heads.get(kind))
        tensors[name] = StoredTensor(shape, np.dtype(np.float32), str(file.path), read)
    return tensors


def _hf_name(file: GgufFile, name: str) -> tuple[str, str]:
    """(Hugging Face name, kind within a layer or "")."""
    if name in _NAMES:
        return _NAMES[name], ""
    match name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _LAYER_NAMES and layer.isdigit():
            return f"model.layers.{int(layer)}.{_LAYER_NAMES[kind]}.weight", kind
    raise InputError(f"{file.path}: unexpected tensor {name}: a llama model has none")


def _read(tensor: gguf.ReaderTensor, shape: tuple[int, ...], heads: int | None, first: int, last: int) -> np.ndarray:
    whole = slice(None) if heads else slice(first, last)  # the quantised blocks lie along the rows
    value = gguf.quants.dequantize(tensor.data[whole], tensor.tensor_type).astype(np.float32, copy=False)
    value = value.reshape(-1, *shape[1:])
    return _undo_rotary_order(value, heads)[first:last] if heads else value


def _undo_rotary_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the two halves of each head: 0 d/2 1 d/2+1 ... -> 0 1 2 ..."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """The tokenizer in Hugging Face's format, {file name: content}; {} if the file has none.

    Raises InputError if it is not byte-level BPE or its pre-tokenizer is unknown.
    """
    get = file.fields.get
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre", "default")
    if kind is None:
        return {}
    if kind != "gpt2":
        raise InputError(f"{file.path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise InputError(f"{file.path}: tokenizer.ggml.pre={pre!r} is not supported; supported: {known}")
    tokens = _get(file, "tokenizer.ggml.tokens")
    types = get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [merge.split(" ", 1) for merge in _get(file, "tokenizer.ggml.merges")]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    for name, key in names.items():
        token_id = get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    named = {name: get(f"tokenizer.chat_template.{name}") for name in get("tokenizer.chat_templates", [])}
    templates = {"default": get("tokenizer.chat_template")} | named
    templates = [{"name": name, "template": template} for name, template in templates.items() if template]
    if templates:
        config["chat_template"] = templates if named else templates[0]["template"]
    begin = config.get("bos_token") if get("tokenizer.ggml.add_bos_token") else None
    begin = None if begin is None else (begin, get("tokenizer.ggml.bos_token_id"))
    contents = {"tokenizer.json": _tokenizer_json(tokens, types, merges, pre, begin), "tokenizer_config.json": config}
    return {name: json.dumps(value, ensure_ascii=False, indent=1).encode() for name, value in contents.items()}


def _tokenizer_json(
    tokens: list[str], types: list[int], merges: list[list[str]], pre: str, begin: tuple[str, int] | None
) -> dict:
    """tokenizer.json; begin: the (token, id) that llama.cpp puts before a text, if any."""
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": kind == _CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    # Unused tokens only pad the vocabulary: left out, their ids are free (for a mask token).
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None if begin is None else _post_processor(*begin),
        "decoder": _BYTE_LEVEL,
        "model": model | {"vocab": vocabulary, "merges": merges},
    }


def _post_processor(token: str, token_id: int) -> dict:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    single, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, single],
        "pair": [first, single, first, other],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
