"""The weights of a model: one declaration each, from which everything else derives.

`declare(config)` returns a `Parameter` for every weight: shape, logical axes, initialiser and name in a Hugging Face
checkpoint. Initialisation, abstract shapes (for ahead-of-time compilation), shardings, checkpoint leaves and both
directions of the converter read these declarations and nothing else. `declare(lora)` returns those of low-rank adapters
(model/lora.py), derived from the weights they adapt; every function here takes either.

This module does without JAX, so that a command line can check what it is given before JAX is imported.
"""

import dataclasses
from collections.abc import Iterable

from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora, adapter_names, weight_of


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Declaration of one weight (of one layer).

    hf_name: name in a Hugging Face checkpoint; {layer} and {expert} are filled in. Adapters have none.
    hf_rows: the weight's rows of that tensor, if several weights are fused in it; None means all.
    matrix:  [in, out], the transpose of Hugging Face's; False: the same element order.
    decayed: weight decay applies. trainable: the optimizer may change it.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    hf_name: str
    init: str = "normal"  # "normal" (std initializer_range) | "ones" | "zeros"
    hf_rows: tuple[int, int] | None = None
    matrix: bool = False
    trainable: bool = True

    @property
    def decayed(self) -> bool:
        return self.init == "normal" or self.matrix

    @property
    def num_inputs(self) -> int:
        """How many leading axes of a dense projection are contracted: it reads the residual stream or writes it."""
        return _num_inputs(self.axes)

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.hf_name


def _num_inputs(axes: tuple[str | None, ...]) -> int:
    return 1 if axes[0] == "embed" else len(axes) - 1


EXPERTS = ("gate", "up", "down")  # matrices of a routed expert
SCALE = "_scale"
SCALES = tuple(name + SCALE for name in EXPERTS)  # beside experts in int8 (sampling/quantize.py)
Declarations = dict[str, "Parameter | dict[str, Parameter]"]


def declare(config: ModelConfig | Lora) -> Declarations:
    """Returns the declarations of every weight of the model, or of every adapter. Those of a layer group are per layer,
    not stacked.
    """
    if isinstance(config, Lora):
        return _adapters(config)
    c = config
    fused = c.architecture in ("bailing_moe", "llada2_moe")
    embedding_name = "model.word_embeddings.weight" if fused else "model.embed_tokens.weight"
    declarations: Declarations = {
        "embedding": Parameter((c.vocab_size, c.hidden_size), ("vocab", "embed"), embedding_name),
        "final_norm": Parameter((c.hidden_size,), (None,), "model.norm.weight", "ones"),
    }
    if not c.tie_word_embeddings:
        declarations["head"] = Parameter(
            (c.hidden_size, c.vocab_size), ("embed", "vocab"), "lm_head.weight", matrix=True
        )
    for group in c.layer_groups:
        attention = _fused_attention(c) if fused else _attention(c)
        mlp = _experts(c) if group == "sparse" else _mlp(c)
        layer = _layer_norms(c) | attention | mlp
        declarations[group] = {
            name: dataclasses.replace(p, hf_name="model.layers.{layer}." + p.hf_name) for name, p in layer.items()
        }
    return declarations


def _layer_norms(c: ModelConfig) -> dict[str, Parameter]:
    return {
        "attention_norm": Parameter((c.hidden_size,), (None,), "input_layernorm.weight", "ones"),
        "mlp_norm": Parameter((c.hidden_size,), (None,), "post_attention_layernorm.weight", "ones"),
    }


def _attention(c: ModelConfig) -> dict[str, Parameter]:
    """Llama and Qwen: separate projections."""
    d, h, kv, hd = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    weights = {
        "query": Parameter((d, h, hd), ("embed", "heads", None), "self_attn.q_proj.weight", matrix=True),
        "key": Parameter((d, kv, hd), ("embed", "kv_heads", None), "self_attn.k_proj.weight", matrix=True),
        "value": Parameter((d, kv, hd), ("embed", "kv_heads", None), "self_attn.v_proj.weight", matrix=True),
        "output": Parameter((h, hd, d), ("heads", None, "embed"), "self_attn.o_proj.weight", matrix=True),
    }
    if c.qkv_bias:
        weights |= {
            "query_bias": Parameter((h, hd), ("heads", None), "self_attn.q_proj.bias", "zeros"),
            "key_bias": Parameter((kv, hd), ("kv_heads", None), "self_attn.k_proj.bias", "zeros"),
            "value_bias": Parameter((kv, hd), ("kv_heads", None), "self_attn.v_proj.bias", "zeros"),
        }
    if c.qk_norm:
        weights |= {
            "query_norm": Parameter((hd,), (None,), "self_attn.q_norm.weight", "ones"),
            "key_norm": Parameter((hd,), (None,), "self_attn.k_norm.weight", "ones"),
        }
    return weights


def _fused_attention(c: ModelConfig) -> dict[str, Parameter]:
    """Ling and LLaDA2: one query_key_value tensor whose rows are all queries, then all keys, then all values."""
    rows = {"query": (0, c.num_heads), "key": (c.num_heads, c.num_kv_heads)}
    rows["value"] = (c.num_heads + c.num_kv_heads, c.num_kv_heads)
    names = {"output": "attention.dense.weight", "query_norm": "attention.query_layernorm.weight",
             "key_norm": "attention.key_layernorm.weight"}  # fmt: skip
    weights = {}
    for name, parameter in _attention(c).items():
        if name in rows:
            first, heads = rows[name]
            hf_rows = (first * c.head_dim, (first + heads) * c.head_dim)
            changes = dict(hf_name="attention.query_key_value.weight", hf_rows=hf_rows)
        else:
            changes = dict(hf_name=names[name])
        weights[name] = dataclasses.replace(parameter, **changes)
    return weights


def _swiglu(d: int, width: int, prefix: str, experts: tuple[int, ...] = ()) -> dict[str, Parameter]:
    axis = ("experts",) if experts else ()
    up = (experts + (d, width), axis + ("embed", "mlp"))
    down = (experts + (width, d), axis + ("mlp", "embed"))
    return {
        "gate": Parameter(*up, f"{prefix}.gate_proj.weight", matrix=True),
        "up": Parameter(*up, f"{prefix}.up_proj.weight", matrix=True),
        "down": Parameter(*down, f"{prefix}.down_proj.weight", matrix=True),
    }


def _mlp(c: ModelConfig) -> dict[str, Parameter]:
    return _swiglu(c.hidden_size, c.intermediate_size, "mlp")


def _experts(c: ModelConfig) -> dict[str, Parameter]:
    d, e, width = c.hidden_size, c.num_experts, c.moe_intermediate_size
    weights = {"router": Parameter((d, e), ("embed", None), "mlp.gate.weight", matrix=True)}
    if c.expert_bias:
        # Ling adjusts it by expert load, never by gradient.
        weights["expert_bias"] = Parameter((e,), (None,), "mlp.gate.expert_bias", "zeros", trainable=False)
    weights |= _swiglu(d, width, "mlp.experts.{expert}", experts=(e,))
    if c.num_shared_experts:
        shared = _swiglu(d, width * c.num_shared_experts, "mlp.shared_experts")
        weights |= {f"shared_{name}": parameter for name, parameter in shared.items()}
    return weights


def adaptable(config: ModelConfig) -> tuple[str, ...]:
    """Names of the weights that may have adapters: the projections of attention, MLP and shared experts."""
    layers = declare(config)
    names = [name for group in config.layer_groups for name, p in layers[group].items() if _is_adaptable(name, p)]
    return tuple(dict.fromkeys(names))


def _is_adaptable(name: str, parameter: Parameter) -> bool:
    return parameter.matrix and not parameter.per_expert and name != "router"


def _adapters(lora: Lora) -> Declarations:
    """A starts random and B zero, so that training starts at the base model. The rank's axis is never sharded."""
    layers = declare(lora.model)

    def pair(p: Parameter) -> tuple[Parameter, Parameter]:
        a_axes, b_axes = _adapter_axes(p.axes)
        split = len(a_axes) - 1
        a = Parameter((*p.shape[:split], lora.rank), a_axes, "", matrix=True)
        return a, Parameter((lora.rank, *p.shape[split:]), b_axes, "", "zeros", matrix=True)

    return {
        group: {
            adapter: declared
            for name, p in layers[group].items()
            if name in lora.targets and _is_adaptable(name, p)
            for adapter, declared in zip(adapter_names(name), pair(p), strict=True)
        }
        for group in lora.layer_groups
    }


def _adapter_axes(axes: tuple[str | None, ...]) -> tuple[tuple, tuple]:
    """Of A [*in, rank] and B [rank, *out]."""
    split = _num_inputs(axes)
    return (*axes[:split], None), (None, *axes[split:])


def layer_axes(config: ModelConfig, group: str, names: Iterable[str]) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of the named weights of one layer of a group; names may be those of adapters, or
    SCALES.
    """
    declared = declare(config)[group]

    def axes(name):
        if name in SCALES:
            experts, _, out = declared[name.removesuffix(SCALE)].axes
            return experts, None, out
        weight = weight_of(name)
        return declared[weight].axes if name == weight else _adapter_axes(declared[weight].axes)[name.endswith("_b")]

    return {name: axes(name) for name in names}


def is_parameter(x) -> bool:
    return isinstance(x, Parameter)


def leaf_name(name: str, layer: int | None = None) -> str:
    """Name of a checkpoint leaf: "final_norm", or "layers.007.query"."""
    return name if layer is None else f"layers.{layer:03d}.{name}"


def leaves(config: ModelConfig | Lora) -> dict[str, tuple[Parameter, int | None]]:
    """Returns every checkpoint leaf, in a fixed order: {leaf name: (declaration, layer or None)}."""
    groups = config.layer_groups
    flat = {}
    for name, node in declare(config).items():
        if name not in groups:
            flat[leaf_name(name)] = (node, None)
    for group, layers in groups.items():
        for layer in layers:
            for name, parameter in declare(config)[group].items():
                flat[leaf_name(name, layer)] = (parameter, layer)
    return flat
