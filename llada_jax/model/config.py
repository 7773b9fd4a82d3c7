"""The values that define a model, and the presets with the exact published values.

One `ModelConfig` covers Llama, Qwen2, Qwen3, Qwen3-MoE, Ling-2.0 and LLaDA2.x: they differ in values only.
"""

import dataclasses
from collections.abc import Iterable

from llada_jax.errors import InputError, check_range

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe", "bailing_moe", "llada2_moe")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension of the rotary embedding: positions divided by `factor` (linear), YaRN (arXiv 2309.00071) or
    Llama 3's smooth rescaling.
    """

    kind: str  # "linear" | "yarn" | "llama3"
    factor: float
    original_length: int = 0  # 0 with linear, which needs none
    # llama3 only: wavelengths above original_length / low_freq_factor are divided by `factor`, and so on.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        linear, kinds = self.kind == "linear", ("linear", "yarn", "llama3")
        _check("rope_scaling.kind", self.kind, self.kind in kinds, f"one of {', '.join(kinds)}")
        check_range("model config: rope_scaling.factor", self.factor, at_least=1)
        length, low = self.original_length, self.low_freq_factor
        _check("rope_scaling.original_length", length, length > 0 or linear and length == 0, "positive")
        check_range("model config: rope_scaling.low_freq_factor", low, above=0)
        check_range("model config: rope_scaling.high_freq_factor", self.high_freq_factor, above=low)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The values of a decoder-only transformer. Hashable, so that it can be a static argument of jit.

    Raises InputError naming the field if a value is out of range.

    Example:
        >>> import llada_jax
        >>> config = llada_jax.preset("tiny").replace(num_layers=2)
        >>> llada_jax.ModelConfig.from_dict(config.to_dict()) == config
        True
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rotary_dim: int = 0  # the first rotary_dim channels of a head are rotated; 0 means all
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head, before the rotation
    tie_word_embeddings: bool = False
    stores_tied_head: bool = False  # the imported checkpoint stores lm_head although it is tied: export writes it too
    initializer_range: float = 0.02

    # Mixture of experts; num_experts = 0 is a dense model.
    num_experts: int = 0
    num_experts_per_token: int = 0
    num_shared_experts: int = 0
    moe_intermediate_size: int = 0
    num_dense_layers: int = 0  # leading layers with a plain MLP
    router: str = "softmax"  # "softmax" (Qwen3) | "sigmoid" (Ling: biased, group-limited selection)
    expert_bias: bool = False
    num_groups: int = 1
    num_selected_groups: int = 1
    # LLaDA2.2: each block of routing_block tokens of a row uses at most routing_block_experts experts, and there is no
    # limit to groups; 0 is off.
    routing_block: int = 0
    routing_block_experts: int = 0
    normalize_expert_weights: bool = True
    routed_scaling_factor: float = 1.0

    # What diffusion adds.
    alignment: str = "same"  # "same": position i's logits predict token i; "shifted": position i-1's do
    mask_token_id: int | None = None
    eos_token_id: int | None = None  # the first end of sequence ...
    other_eos_token_ids: tuple[int, ...] = ()  # ... and all others; decoding stops at any of them
    pad_token_id: int | None = None
    # LLaDA2.2: the tokens that delete a position and insert one before it, its delete_token_id and split_token_id.
    delete_token_id: int | None = None
    insert_token_id: int | None = None

    def __post_init__(self):
        if not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        _check_config(self)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ends of sequence, the first one first, without repeats."""
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        return tuple(dict.fromkeys((*first, *self.other_eos_token_ids)))

    @property
    def layer_groups(self) -> dict[str, range]:
        """Runs of equal layers, stacked for scan: {"dense": layers with an MLP, "sparse": layers with experts}."""
        first_sparse = self.num_dense_layers if self.is_moe else self.num_layers
        groups = {"dense": range(first_sparse), "sparse": range(first_sparse, self.num_layers)}
        return {name: layers for name, layers in groups.items() if layers}

    def with_ends(self, ids: Iterable[int]) -> "ModelConfig":
        """Returns the config with these ends of sequence appended to its own."""
        first, *others = dict.fromkeys((*self.eos_token_ids, *ids)) or [None]
        return self.replace(eos_token_id=first, other_eos_token_ids=tuple(others))

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    def extended(self, factor: float) -> "ModelConfig":
        """Returns the config with its context extended `factor` times by YaRN (arXiv 2309.00071), as LLaDA2.0 doubles
        its context.

        Raises InputError if the rotary embedding is scaled already or the factor is below 1.
        """
        if self.rope_scaling is not None:
            raise InputError(f"YaRN by {factor}: the model has rope_scaling already, {self.rope_scaling}")
        length = self.max_position_embeddings
        scaling = RopeScaling("yarn", float(factor), length)
        return self.replace(rope_scaling=scaling, max_position_embeddings=int(factor * length))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Inverse of to_dict. Raises InputError on an unknown or missing field."""
        values = dict(values)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"model config: unknown field {unknown[0]!r}")
        if values.get("rope_scaling"):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        values["other_eos_token_ids"] = tuple(values.get("other_eos_token_ids", ()))  # older checkpoints have none
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"model config: {error}") from error


def _check(field: str, value, ok: bool, expected: str) -> None:
    if not ok:
        raise InputError(f"model config: {field}={value!r}, expected {expected}")


def _check_config(c: ModelConfig) -> None:
    _check("architecture", c.architecture, c.architecture in ARCHITECTURES, f"one of {', '.join(ARCHITECTURES)}")
    for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                  "intermediate_size", "max_position_embeddings"):  # fmt: skip
        value = getattr(c, field)
        _check(field, value, isinstance(value, int) and 0 < value < 2**31, "a positive integer")
    _check("num_heads", c.num_heads, c.num_heads % c.num_kv_heads == 0, f"a multiple of {c.num_kv_heads=}")
    _check("rotary_dim", c.rotary_dim, 0 < c.rotary_dim <= c.head_dim and c.rotary_dim % 2 == 0, "even, <= head_dim")
    for field in ("rope_theta", "routed_scaling_factor"):
        check_range(f"model config: {field}", getattr(c, field), above=0)
    check_range("model config: initializer_range", c.initializer_range, at_least=0)
    _check("rms_norm_eps", c.rms_norm_eps, 0 < c.rms_norm_eps < 1, "between 0 and 1")
    _check("alignment", c.alignment, c.alignment in ("same", "shifted"), '"same" or "shifted"')
    for field in ("mask_token_id", "eos_token_id", "pad_token_id", "delete_token_id", "insert_token_id"):
        value = getattr(c, field)
        _check(field, value, value is None or 0 <= value < c.vocab_size, f"below vocab_size={c.vocab_size}")
    others = c.other_eos_token_ids
    _check("other_eos_token_ids", others, all(0 <= i < c.vocab_size for i in others), f"below {c.vocab_size=}")
    if c.is_moe:
        _check_moe(c)


def _check_moe(c: ModelConfig) -> None:
    _check("router", c.router, c.router in ("softmax", "sigmoid"), '"softmax" or "sigmoid"')
    _check("moe_intermediate_size", c.moe_intermediate_size, c.moe_intermediate_size > 0, "positive")
    _check("num_dense_layers", c.num_dense_layers, 0 <= c.num_dense_layers < c.num_layers, "below num_layers")
    _check("num_groups", c.num_groups, 0 < c.num_groups and c.num_experts % c.num_groups == 0, "a divisor of experts")
    selected = c.num_selected_groups
    _check("num_selected_groups", selected, 0 < selected <= c.num_groups, "at most num_groups")
    eligible = selected * c.num_experts // c.num_groups
    k = c.num_experts_per_token
    _check("num_experts_per_token", k, 0 < k <= eligible, f"between 1 and {eligible}")
    block, block_experts = c.routing_block, c.routing_block_experts
    _check("routing_block", block, block >= 0 and (block > 0) == (block_experts > 0), "0 as routing_block_experts is")
    fits = not block or k <= block_experts <= c.num_experts
    _check("routing_block_experts", block_experts, fits, f"between {k} and {c.num_experts}")
    _check("routing_block", block, not block or c.router == "sigmoid", '0 unless router is "sigmoid"')


_LING_MINI = ModelConfig(
    architecture="bailing_moe",
    vocab_size=157_184,
    hidden_size=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=5120,
    rope_theta=600_000.0,
    rotary_dim=64,
    max_position_embeddings=32_768,
    qk_norm=True,
    num_experts=256,
    num_experts_per_token=8,
    num_shared_experts=1,
    moe_intermediate_size=512,
    num_dense_layers=1,
    router="sigmoid",
    expert_bias=True,
    num_groups=8,
    num_selected_groups=4,
    routed_scaling_factor=2.5,
    eos_token_id=156_892,
    pad_token_id=156_892,
)
_LING_FLASH = _LING_MINI.replace(
    hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=9216, moe_intermediate_size=1024
)
_LLADA2 = dict(architecture="llada2_moe", mask_token_id=156_895)
_TINY = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    max_position_embeddings=1024,
    mask_token_id=511,
    eos_token_id=508,
    pad_token_id=508,
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "tiny_moe": _TINY.replace(
        architecture="llada2_moe",
        num_layers=3,
        intermediate_size=256,
        rope_theta=600_000.0,
        rotary_dim=16,
        qk_norm=True,
        num_experts=16,
        num_experts_per_token=4,
        num_shared_experts=1,
        moe_intermediate_size=64,
        num_dense_layers=1,
        router="sigmoid",
        expert_bias=True,
        num_groups=4,
        num_selected_groups=2,
        routed_scaling_factor=2.5,
    ),
    # HuggingFaceTB/SmolLM2-135M
    "smollm2_135m": ModelConfig(
        architecture="llama",
        vocab_size=49_152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.041666666666666664,
        eos_token_id=0,
        pad_token_id=0,
    ),
    # Qwen/Qwen3-30B-A3B
    "qwen3_30b_a3b": ModelConfig(
        architecture="qwen3_moe",
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=6144,
        rope_theta=1_000_000.0,
        max_position_embeddings=40_960,
        qk_norm=True,
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=768,
        eos_token_id=151_645,
        pad_token_id=151_643,
    ),
    "ling_mini": _LING_MINI,
    "ling_flash": _LING_FLASH,
    "llada2_mini": _LING_MINI.replace(**_LLADA2),
    "llada2_flash": _LING_FLASH.replace(**_LLADA2),
}


def preset(name: str) -> ModelConfig:
    """Returns the preset of that name. Raises InputError listing the presets.

    Example:
        >>> import llada_jax
        >>> llada_jax.preset("llada2_mini").num_experts
        256
    """
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]
