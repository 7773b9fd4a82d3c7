"""Which experts a token goes to, and with what weight; float32 end to end."""

import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig


def route(x: jax.Array, router: jax.Array, bias: jax.Array | None, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns experts [tokens, k] int32 and their weights [tokens, k] float32, k = num_experts_per_token.

    x [tokens, embed]; router [embed, experts]; bias [experts] or None.
    "softmax" (Qwen3-MoE): the k largest probabilities. "sigmoid" (Ling 2.0, LLaDA2): the bias steers the selection and
    never the weight; only the num_selected_groups groups with the largest sums of two best scores are eligible.
    Ties go to the lowest index.
    """
    logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if config.router == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
        ranking = scores
    else:
        scores = jax.nn.sigmoid(logits)
        ranking = scores if bias is None else scores + bias.astype(jnp.float32)[None]
        ranking = _limit_to_groups(ranking, config.num_groups, config.num_selected_groups)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(ranking), config.num_experts_per_token)
    # A sum with one term: the gradient of take_along_axis would be a scatter.
    chosen = experts[..., None] == jnp.arange(config.num_experts)[None, None]
    weights = jnp.where(chosen, scores[:, None], 0).sum(-1)
    if config.normalize_expert_weights and config.num_experts_per_token > 1:
        weights /= weights.sum(-1, keepdims=True) + 1e-20
    return experts, weights * config.routed_scaling_factor


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
