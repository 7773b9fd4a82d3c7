"""GGUF files (llama.cpp) -> ModelConfig, tensors under their Hugging Face names, and the tokenizer's files."""

import dataclasses
import functools
import json
from pathlib import Path

import gguf
import numpy as np

from llada_jax.errors import InputError
from llada_jax.interop.huggingface import StoredTensor
from llada_jax.model.config import ModelConfig

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


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open file; `fields` are its metadata, {key: value}."""

    path: Path
    fields: dict
    tensors: list[gguf.ReaderTensor]


def open_gguf(path: Path) -> GgufFile:
    """Raises InputError if the file is truncated, malformed, or not of the llama architecture."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # a truncated file fails wherever the reader has got to
        raise InputError(f"{path}: not a complete GGUF file ({type(error).__name__}: {error})") from error
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: general.architecture={architecture!r} is not supported; supported: llama")
    return GgufFile(path, fields, reader.tensors)


def model_config(file: GgufFile) -> ModelConfig:
    """Raises InputError naming the metadata key that is missing or that the forward pass cannot honour."""
    names = {tensor.name for tensor in file.tensors}
    heads = _get(file, "llama.attention.head_count")
    head_dim = _get(file, "llama.attention.key_length", _get(file, "llama.embedding_length") // heads)
    for key, honoured in {
        "llama.rope.dimension_count": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
    }.items():
        if _get(file, key, honoured) != honoured:
            raise InputError(f"{file.path}: {key}={file.fields[key]!r} is not supported")
    if "rope_freqs.weight" in names:
        raise InputError(f"{file.path}: rope_freqs.weight (rescaled rotary frequencies) is not supported")
    embedding = next((tensor for tensor in file.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise InputError(f"{file.path}: missing tensor token_embd.weight")
    return ModelConfig(
        architecture="llama",
        vocab_size=int(embedding.shape[1]),  # GGUF lists the fastest dimension first
        hidden_size=_get(file, "llama.embedding_length"),
        num_layers=_get(file, "llama.block_count"),
        num_heads=heads,
        num_kv_heads=_get(file, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_get(file, "llama.feed_forward_length"),
        # Stored as float32: the shortest decimal that rounds to it is what the author wrote.
        rms_norm_eps=float(str(np.float32(_get(file, "llama.attention.layer_norm_rms_epsilon")))),
        rope_theta=float(str(np.float32(_get(file, "llama.rope.freq_base", 10_000.0)))),
        max_position_embeddings=_get(file, "llama.context_length"),
        tie_word_embeddings="output.weight" not in names,
        alignment="shifted",
        pad_token_id=file.fields.get("tokenizer.ggml.padding_token_id"),
    ).with_ends(file.fields[key] for key in _ENDS if key in file.fields)


def _get(file: GgufFile, key: str, default=None):
    value = file.fields.get(key, default)
    if value is None:
        raise InputError(f"{file.path}: metadata {key} is missing")
    if isinstance(value, list) and key.startswith("llama."):  # one value per layer
        raise InputError(f"{file.path}: {key}={value!r} is not supported")
    return value


def open_weights(file: GgufFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """Tensors under their Hugging Face names and shapes, dequantised to float32 when they are read.

    Raises InputError naming a tensor that a llama model does not have.
    """
    tensors = {}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for tensor in file.tensors:
        name, kind = _hf_name(file, tensor.name)
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
    """llama.cpp interleaves the two halves of each head, which we rotate as halves: 0 d/2 1 d/2+1 ... -> 0 1 2 ..."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """{file name: content} in Hugging Face's format, {} if the file holds no tokenizer.

    Raises InputError on another kind than byte-level BPE, or an unknown pre-tokenizer.
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
    if template := get("tokenizer.chat_template"):
        config["chat_template"] = template
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
