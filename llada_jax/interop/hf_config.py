"""Hugging Face config.json <-> ModelConfig. A setting that our forward pass does not implement is refused."""

import numpy as np

from llada_jax.errors import InputError
from llada_jax.interop import config_keys, rope_config
from llada_jax.interop.config_values import boolean, integer, number, unsupported
from llada_jax.model.config import ModelConfig

# Class name in `architectures` -> our architecture. Ling 1 shares Ling 2's model_type, so the class name decides.
_CLASSES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "BailingMoeV2ForCausalLM": "bailing_moe",
    "LLaDA2MoeModelLM": "llada2_moe",
}
_MODEL_TYPES = {name: name for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "bailing_moe", "llada2_moe")} | {
    "bailing_moe_v2": "bailing_moe",
    "llada2_moe_veomni": "llada2_moe",
}

_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}
_QWEN_MOE = {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_LING = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "moe_router_enable_expert_bias": True}
# Defaults of the configuration classes: what a key means when config.json lacks it.
_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen3_moe": _QWEN | _QWEN_MOE | {"norm_topk_prob": False},
    "bailing_moe": _LING
    | {"max_position_embeddings": 32_768, "rope_theta": 600_000.0, "num_key_value_heads": 4, "head_dim": 128}
    | {"num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": 512}
    | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.0},
    "llada2_moe": _LING
    | {"max_position_embeddings": 16_384, "rms_norm_eps": 1e-5}
    | {"num_experts": 16, "num_experts_per_tok": 2, "num_shared_experts": 0}
    | {"first_k_dense_replace": 0, "routed_scaling_factor": 2.5},
}

# Not a key of transformers: which token a position predicts, where that is not the architecture's own alignment.
_ALIGNMENT = "diffusion_alignment"
_LLADA2_AUTO_MAP = {
    "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
    "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
    "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
}


def architecture_of(hf: dict) -> str:
    """Our name for the architecture. Raises InputError listing the supported ones."""
    names, model_type = hf.get("architectures", []), hf.get("model_type")
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in [*names, model_type or ""]):
        raise InputError(f"config.json: architectures={names!r}, model_type={model_type!r}, expected names")
    if names and names[0] in _CLASSES:
        return _CLASSES[names[0]]
    if not names and model_type in _MODEL_TYPES:
        return _MODEL_TYPES[model_type]
    given = f"architectures={names!r}" if names else f"model_type={model_type!r}"
    raise InputError(f"config.json: {given} is not supported; supported: {', '.join(_CLASSES)}")


def from_hf(hf: dict) -> ModelConfig:
    """ModelConfig from a config.json. The alignment is "shifted" for AR architectures and "same" for LLaDA2, unless
    the file sets diffusion_alignment.

    Raises InputError naming a field that is missing, malformed, or that the forward pass does not implement.
    """
    architecture = architecture_of(hf)
    ling = architecture in ("bailing_moe", "llada2_moe")
    config_keys.check(hf, architecture)
    defaults = _DEFAULTS[architecture]
    if hf.get("num_key_value_heads", 0) is None and not ling:  # null is not the class's default but num_attention_heads
        hf = hf | {"num_key_value_heads": hf.get("num_attention_heads")}
    given = {key: value for key, value in hf.items() if value is not None}
    hf = defaults | given
    length = {"max_position_embeddings": defaults["max_position_embeddings"]}
    rope = rope_config.read(length | given, defaults.get("rope_theta", 10_000.0))
    heads = integer(hf, "num_attention_heads")
    hidden = integer(hf, "hidden_size")
    head_dim = integer(hf, "head_dim", hidden // max(heads, 1))
    pad = _token(hf, "pad_token_id")
    ends = _tokens(hf, "eos_token_id")
    # The Ling family's config.json often holds no eos: it is the pad token.
    ends = [pad] if ling and not ends and pad is not None else ends
    return ModelConfig(
        architecture=architecture,
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=integer(hf, "num_hidden_layers"),
        num_heads=heads,
        # The LLaDA2 class has no usable default.
        num_kv_heads=integer(hf, "num_key_value_heads", None if architecture == "llada2_moe" else heads),
        head_dim=head_dim,
        intermediate_size=integer(hf, "intermediate_size"),
        rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
        rope_theta=rope.theta,
        rotary_dim=_rotary_dim(hf, architecture, head_dim, rope.partial),
        rope_scaling=rope.scaling,
        max_position_embeddings=integer(hf, "max_position_embeddings"),
        qkv_bias=architecture == "qwen2",
        # LLaDA2 always normalises, whatever `use_qk_norm` says (its class default is false).
        qk_norm=ling or architecture in ("qwen3", "qwen3_moe"),
        tie_word_embeddings=boolean(hf, "tie_word_embeddings", False),
        initializer_range=number(hf, "initializer_range", 0.02),
        alignment=hf.get(_ALIGNMENT, _own_alignment(architecture)),
        mask_token_id=_token(hf, "mask_token_id"),
        eos_token_id=ends[0] if ends else None,
        other_eos_token_ids=tuple(ends[1:]),
        pad_token_id=pad,
        delete_token_id=_token(hf, "delete_token_id"),
        insert_token_id=_token(hf, "split_token_id"),
        **_experts(hf, given, architecture),
    )


def _own_alignment(architecture: str) -> str:
    return "same" if architecture == "llada2_moe" else "shifted"


def _experts(hf: dict, given: dict, architecture: str) -> dict:
    """`given`: hf without the class's defaults."""
    if architecture in ("llama", "qwen2", "qwen3"):
        return {}
    per_token = integer(hf, "num_experts_per_tok")
    # transformers 5 may write the count under its other name.
    name = "num_local_experts" if "num_local_experts" in given else "num_experts"
    if name in given and given.get("num_experts", given[name]) != given[name]:
        raise InputError(
            f"config.json: num_experts={given['num_experts']!r} contradicts num_local_experts={given[name]!r}"
        )
    fields = {
        "num_experts": integer(hf, name),
        "num_experts_per_token": per_token,
        "moe_intermediate_size": integer(hf, "moe_intermediate_size"),
        "normalize_expert_weights": boolean(hf, "norm_topk_prob"),
    }
    if architecture == "qwen3_moe":
        return fields
    return fields | {
        "num_shared_experts": integer(hf, "num_shared_experts"),
        "num_dense_layers": integer(hf, "first_k_dense_replace"),
        "router": "sigmoid",
        "expert_bias": boolean(hf, "moe_router_enable_expert_bias"),
        "num_groups": integer(hf, "n_group"),
        "num_selected_groups": integer(hf, "topk_group"),
        **_block_routing(hf),
        "normalize_expert_weights": per_token > 1,  # the reference does not read norm_topk_prob
        "routed_scaling_factor": number(hf, "routed_scaling_factor"),
    }


def _block_routing(hf: dict) -> dict:
    """LLaDA2.2: at most `expert_capacity` experts per block of tokens."""
    experts = integer(hf, "expert_capacity", 0)
    return {"routing_block": integer(hf, "block_size", 32), "routing_block_experts": experts} if experts else {}


def _rotary_dim(hf: dict, architecture: str, head_dim: int, partial: float | None) -> int:
    """Ling-1T gives only rotary_dim, others only partial_rotary_factor, LLaDA2 both."""
    given = integer(hf, "rotary_dim", 0)
    whole = head_dim // 2 if architecture == "llada2_moe" else head_dim
    rotary_dim = given or whole if partial is None else int(head_dim * partial)
    if given and given != rotary_dim:
        raise InputError(f"config.json: rotary_dim={given} contradicts partial_rotary_factor={partial}")
    if rotary_dim != head_dim and architecture not in ("bailing_moe", "llada2_moe"):
        name, value = ("rotary_dim", given) if partial is None else ("partial_rotary_factor", partial)
        raise unsupported(name, value)
    return rotary_dim


def _token(hf: dict, name: str) -> int | None:
    """An id, the first of a list of ids, or None."""
    return next(iter(_tokens(hf, name)), None)


def _tokens(hf: dict, name: str) -> list[int]:
    """The ids in a field: one id, a list, or none; some checkpoints write -1 for none."""
    value = hf.get(name)
    values = value if isinstance(value, list) else [value]
    ids = [integer({name: each}, name) for each in values if each is not None and each != -1]
    return list(dict.fromkeys(ids))


def ends_of_sequence(hf: dict, generation: dict) -> list[int]:
    """All end-of-sequence ids of config.json and generation_config.json, in the order of preference of transformers'
    `generate`. Raises InputError naming the field.
    """
    try:
        preferred = _tokens(generation, "eos_token_id")
    except InputError as error:
        raise InputError(f"generation_{error}") from error
    return list(dict.fromkeys([*preferred, *_tokens(hf, "eos_token_id")]))


def exported(config: ModelConfig, source: dict, dtype: np.dtype, generation: dict | None = None) -> dict:
    """config.json of an export: `source`, that of the folder the weights come from ({}: none), updated to `config`.

    generation: the generation_config.json beside it. Changed are the dtype, ids of special tokens that neither file
    names, num_nextn_predict_layers (such layers are dropped on import), and an alignment that is not the
    architecture's. A Ling model with alignment "same" is exported as LLaDA2.
    Raises InputError naming a field that config.json cannot express for this architecture.
    """
    if config.architecture == "bailing_moe" and config.alignment == "same":
        config = config.replace(architecture="llada2_moe")
    ours = to_hf(config)
    try:
        same = to_hf(from_hf(source)) if source else {}
    except InputError:  # a GGUF file's metadata
        same = {}
    changed = {key: value for key, value in ours.items() if key not in same or same[key] != value}
    if set(ends_of_sequence(source, generation or {})) & set(config.eos_token_ids):
        changed.pop("eos_token_id", None)  # what the folder says of them stays, each file as it was
    if "model_type" in changed and config.architecture == "llada2_moe":
        changed["auto_map"] = _LLADA2_AUTO_MAP
    if source.get("num_nextn_predict_layers"):
        changed["num_nextn_predict_layers"] = 0
    if source.get("rope_parameters") and changed.keys() & {"rope_theta", "rope_scaling"}:
        source = {key: value for key, value in source.items() if key not in ("rope_theta", "rope_scaling")}
        changed = {key: value for key, value in changed.items() if key not in ("rope_theta", "rope_scaling")}
        changed |= rope_config.restated(config, source)
    hf = source | changed
    hf |= {"dtype" if "dtype" in source else "torch_dtype": dtype.name}
    back = from_hf(hf).replace(stores_tied_head=config.stores_tied_head).to_dict()
    for field, value in config.to_dict().items():
        if back[field] != value and field not in ("eos_token_id", "other_eos_token_ids"):
            raise InputError(f"model {field}={value!r}: {config.architecture} has no config.json that says so")
    return hf


def remote_modules(hf: dict) -> list[str]:
    """Python modules that transformers looks for beside config.json."""
    classes = hf["auto_map"].values() if isinstance(hf.get("auto_map"), dict) else []
    return sorted({each.split(".")[0] for each in classes if isinstance(each, str) and "--" not in each})


def to_hf(config: ModelConfig) -> dict:
    """config.json of a model; `from_hf(to_hf(config)) == config` but for stores_tied_head."""
    c = config
    class_name = next(name for name, architecture in _CLASSES.items() if architecture == c.architecture)
    hf = {
        "architectures": [class_name],
        "model_type": c.architecture,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope_config.to_hf(c.rope_scaling),
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "tie_word_embeddings": c.tie_word_embeddings,
        "eos_token_id": list(c.eos_token_ids) if c.other_eos_token_ids else c.eos_token_id,
        "pad_token_id": c.pad_token_id,
    }
    named = {
        "mask_token_id": c.mask_token_id,
        "delete_token_id": c.delete_token_id,
        "split_token_id": c.insert_token_id,
    }
    hf |= {key: value for key, value in named.items() if value is not None}
    if c.alignment != _own_alignment(c.architecture):
        hf[_ALIGNMENT] = c.alignment
    return hf | _experts_to_hf(c)


def _experts_to_hf(c: ModelConfig) -> dict:
    if not c.is_moe:
        return {}
    hf = {
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_token,
        "moe_intermediate_size": c.moe_intermediate_size,
        "norm_topk_prob": c.normalize_expert_weights,
    }
    if c.architecture == "qwen3_moe":
        return hf | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return hf | {
        "num_shared_experts": c.num_shared_experts,
        "first_k_dense_replace": c.num_dense_layers,
        "n_group": c.num_groups,
        "topk_group": c.num_selected_groups,
        "routed_scaling_factor": c.routed_scaling_factor,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": c.expert_bias,
        "partial_rotary_factor": c.rotary_dim / c.head_dim,
        "rotary_dim": c.rotary_dim,
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        **({"expert_capacity": c.routing_block_experts, "block_size": c.routing_block} if c.routing_block else {}),
    }
