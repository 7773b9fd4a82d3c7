"""The cost of the router's Pallas kernels: selection of experts, its gradient, and the counting sort of rows."""

import jax
import jax.numpy as jnp

from llada_jax.chips import Topology
from llada_jax.model import router_kernel
from llada_jax.model.config import ModelConfig
from llada_jax.model.rows_kernel import PARTS, TILE, rows_by_expert
from llada_jax.pod.step_cost import KernelCost
from llada_jax.pod.stream_cost import stream_costs

_FEWEST = 4 * PARTS * TILE  # tokens; with fewer, the loop has one step or none


def kernel_costs(config: ModelConfig, tokens: int, ranks: int, topology: Topology) -> dict[str, KernelCost]:
    """{prefix of a kernel's name: its cost} for a device that routes `tokens` tokens (rounded to whole tiles).

    ranks: of the expert axis, where tokens are gathered over it, else 1.
    """

    def costs(kind, tokens):
        whole = max(_FEWEST, -(-tokens // (PARTS * TILE)) * PARTS * TILE)
        arguments = dict(config=config.to_dict(), tokens=whole, ranks=ranks)
        return stream_costs(f"{__name__}:{kind}", arguments, whole // TILE, "glue", topology)

    return (costs("selection", tokens) if router_kernel.fits(config) else {}) | costs("sorting", tokens * ranks)


def selection(config: dict, tokens: int, ranks: int):
    """For aot.compile_program: both selection kernels for `tokens` tokens, TILE per step."""
    config = ModelConfig.from_dict(config)
    logits = jax.ShapeDtypeStruct((config.num_experts, tokens), jnp.float32)
    bias = jax.ShapeDtypeStruct((config.num_experts,), jnp.float32) if config.expert_bias else None
    d_scores = jax.ShapeDtypeStruct((config.num_experts_per_token, tokens), jnp.float32)

    def run(logits, bias, d_scores):
        experts, scores = router_kernel.choose(logits, bias, config)
        saved_logits = logits if config.router == "softmax" else None
        return router_kernel.gradient(experts, scores, d_scores, saved_logits, config)

    return run, (logits, bias, d_scores)


def sorting(config: dict, tokens: int, ranks: int):
    """For aot.compile_program: the sort of all ranks' tokens by the experts of one rank."""
    config = ModelConfig.from_dict(config)
    experts = jax.ShapeDtypeStruct((config.num_experts_per_token, tokens), jnp.int32)
    return lambda experts: rows_by_expert(experts, config.num_experts // ranks), (experts,)
