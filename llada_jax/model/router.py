"""The router: which experts each token goes to, and with what weight. float32 end to end."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llada_jax.model import router_kernel
from llada_jax.model.config import ModelConfig


def route(
    x: jax.Array, router: jax.Array, bias: jax.Array | None, config: ModelConfig, kernel: str = "xla",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns experts [k, tokens] int32 and their weights [k, tokens] float32, k = num_experts_per_token.

    x [tokens, embed]; router [embed, experts]; bias [experts] or None.
    "softmax" (Qwen3-MoE): the k largest probabilities. "sigmoid" (Ling 2.0, LLaDA2): the bias steers the selection and
    never the weight; only the num_selected_groups groups with the largest sums of two best scores are eligible. With
    routing_block (LLaDA2.2) tokens are whole blocks instead, and only the routing_block_experts experts with the
    largest score of any token of the block are. Ties go to the lowest index.
    kernel, interpret: as in grouped_matmul; of configurations that do not fit router_kernel.py, "megablox" selects as
    "xla" does.
    """
    logits = _logits(x, router.astype(jnp.float32))
    bias = None if bias is None else bias.astype(jnp.float32)
    if kernel == "megablox" and router_kernel.fits(config):
        experts, weights = router_kernel.select(logits.T, bias, config, interpret)
    else:
        experts, weights = _select(checkpoint_name(logits, "routing"), bias, config)
    if config.normalize_expert_weights and config.num_experts_per_token > 1:
        weights /= weights.sum(0, keepdims=True) + 1e-20
    return experts, weights * config.routed_scaling_factor


def _select(logits: jax.Array, bias: jax.Array | None, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Experts and their scores, [k, tokens], for logits [tokens, experts]."""
    if config.router == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
        ranking = scores
    else:
        scores = jax.nn.sigmoid(logits)
        ranking = scores if bias is None else scores + bias[None]
        if config.routing_block:
            ranking = _limit_in_blocks(ranking, config.routing_block, config.routing_block_experts)
        else:
            ranking = _limit_to_groups(ranking, config.num_groups, config.num_selected_groups)
    experts = jax.lax.top_k(jax.lax.stop_gradient(ranking), config.num_experts_per_token)[1].T
    experts = checkpoint_name(experts, "routing")
    # A sum with one term: the gradient of take_along_axis would be a scatter.
    chosen = experts[..., None] == jnp.arange(config.num_experts)[None, None]
    return experts, checkpoint_name(jnp.where(chosen, scores[None], 0).sum(-1), "routing")


@jax.custom_vjp
def _logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """x W in float32. A TPU computes it in bfloat16 passes, one for each pair of parts of x and W: six at HIGHEST.

    An x in bfloat16 has one part only, so three passes are as exact. For gradients HIGH is enough: three passes, or two
    (error about 1e-6).
    """
    if x.dtype == jnp.bfloat16:
        products = jnp.dot(x, jnp.concatenate(_parts(router), axis=1), preferred_element_type=jnp.float32)
        first, second, third = jnp.split(products, 3, axis=1)
        return third + second + first
    return jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)


def _parts(x: jax.Array) -> list[jax.Array]:
    """Returns three bfloat16 arrays whose sum is x, float32."""
    parts = []
    for _ in range(3):
        # XLA may drop a conversion there and back, but not this.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _logits_forward(x, router):
    return _logits(x, router), (x, router)


def _logits_backward(residuals, cotangent):
    x, router = residuals
    high = jax.lax.Precision.HIGH
    of_x = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else high
    d_x = jnp.dot(cotangent, router.T, precision=high).astype(x.dtype)
    return d_x, jnp.dot(x.astype(jnp.float32).T, cotangent, precision=(of_x, high))


_logits.defvjp(_logits_forward, _logits_backward)


def _limit_to_groups(ranking: jax.Array, groups: int, selected: int) -> jax.Array:
    """Puts -inf on experts outside each token's best groups; a group's score is the sum of its two best."""
    if groups == 1:
        return ranking
    tokens = ranking.shape[0]
    grouped = ranking.reshape(tokens, groups, -1)
    group_score = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    _, best = jax.lax.top_k(group_score, selected)
    eligible = jax.nn.one_hot(best, groups, dtype=bool).any(axis=1)
    return jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(ranking.shape)


def _limit_in_blocks(ranking: jax.Array, block: int, selected: int) -> jax.Array:
    """Puts -inf on experts outside the best of each block of tokens; an expert's score is its highest in the block."""
    blocks = ranking.reshape(-1, block, ranking.shape[1])
    _, best = jax.lax.top_k(blocks.max(axis=1), selected)
    eligible = jax.nn.one_hot(best, ranking.shape[1], dtype=bool).any(axis=1)
    return jnp.where(eligible[:, None], blocks, -jnp.inf).reshape(ranking.shape)


def balanced_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Returns the expert bias after a step: raised for experts with fewer tokens than the mean, lowered for the others.

    Loss-free balancing (arXiv 2408.15664) as Ling 2.0 trains: the update is rate * sign(mean load - load), minus its
    mean over the experts. bias float32 [layers, experts]; load [layers, experts]: tokens per expert in the step.
    """
    load = load.astype(jnp.float32)
    step = jnp.sign(load.mean(axis=1, keepdims=True) - load)
    return (bias + rate * (step - step.mean(axis=1, keepdims=True))).astype(bias.dtype)
