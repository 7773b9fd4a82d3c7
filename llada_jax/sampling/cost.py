"""What a decoding pass costs: bytes read and FLOPs as a function of the tokens in it, and what bounds it."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from llada_jax.chips import CHIPS, Chip
from llada_jax.model.config import ModelConfig

# Cost of a window's second block on a device that chips.py does not know, as a share of a pass; as on CPUs, where
# `python tools/bench.py decode` measures it.
UNKNOWN_PRICE = 0.75


@dataclasses.dataclass(frozen=True)
class PassCost:
    """Cost of one pass with all weights on one device: bytes read from memory, FLOPs of its matmuls."""

    bytes: float
    flops: float

    def seconds(self, chip: Chip) -> float:
        """The roofline's lower bound, in bfloat16."""
        return max(self.bytes / chip.hbm_bandwidth, self.flops / chip.peak_bf16)

    def bound(self, chip: Chip) -> str:
        return "compute" if self.flops / chip.peak_bf16 >= self.bytes / chip.hbm_bandwidth else "memory"


def uniform_hits(config: ModelConfig, tokens: int) -> float:
    """Expected number of experts of a layer that `tokens` tokens reach, if routing is uniform and independent: an upper
    estimate.
    """
    return config.num_experts * (1 - (1 - config.num_experts_per_token / config.num_experts) ** tokens)


def pass_cost(
    config: ModelConfig,
    tokens: int,
    head_positions: int,
    cached_tokens: int = 0,
    context: int = 0,
    hits: Callable[[ModelConfig, int], float] = uniform_hits,
    bytes_per_value: int = 2,
    bytes_per_expert_value: int | None = None,
) -> PassCost:
    """Cost of a pass over `tokens` window tokens, `head_positions` of which need logits.

    cached_tokens: tokens in the caches of all rows together. context: keys that each token sees. hits(config, tokens):
    distinct experts that a layer reads. bytes_per_expert_value: of routed experts, None: as all else.
    """
    d, sparse = config.hidden_size, len(config.layer_groups.get("sparse", ()))
    dense = config.num_layers - sparse
    head_values = config.num_heads * config.head_dim
    kv_values = config.num_kv_heads * config.head_dim
    attention = d * (2 * head_values + 2 * kv_values)
    expert = 3 * d * config.moe_intermediate_size
    per_token = config.num_layers * attention + dense * 3 * d * config.intermediate_size
    read, routed = per_token, 0
    if sparse:
        shared = d * config.num_experts + config.num_shared_experts * expert
        per_token += sparse * (shared + config.num_experts_per_token * expert)
        read += sparse * shared
        routed = sparse * hits(config, tokens) * expert
    head = d * config.vocab_size
    cache = 2 * config.num_layers * kv_values * cached_tokens
    scores = 4 * config.num_layers * head_values * context * tokens
    read += (head if head_positions else 0) + tokens * d + cache
    return PassCost(
        bytes=read * bytes_per_value + routed * (bytes_per_expert_value or bytes_per_value),
        flops=2 * per_token * tokens + 2 * head * head_positions + scores,
    )


def second_block_price(
    config: ModelConfig, rows: int, block_length: int, device_kind: str | None = None, int8_experts: bool = False
) -> float:
    """Returns the cost of a window's second block as a share of a pass, 0 to 1: little while reading weights dominates.

    device_kind: None is that of the first device. The roofline of the chip gives the share; UNKNOWN_PRICE if chips.py
    does not know the device.
    """
    device_kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    chip = next((chip for chip in CHIPS.values() if chip.device_kind == device_kind), None)
    if chip is None:
        return UNKNOWN_PRICE
    tokens = rows * block_length
    price = functools.partial(pass_cost, config, bytes_per_expert_value=1 if int8_experts else 2)
    one, two = (price(n * tokens, tokens // 2).seconds(chip) for n in (1, 2))
    return two / one - 1


def compute_bound_rows(
    config: ModelConfig,
    block_length: int,
    chip: Chip,
    hits: Callable[[ModelConfig, int], float] = uniform_hits,
    most: int = 4096,
) -> int | None:
    """Returns the smallest power of two of rows whose pass is compute-bound; None if `most` rows are not enough."""
    rows = 1
    while rows <= most:
        tokens = rows * block_length
        if pass_cost(config, tokens, tokens // 2, hits=hits).bound(chip) == "compute":
            return rows
        rows *= 2
    return None
