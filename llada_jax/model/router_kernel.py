"""Pallas kernels of the router: from logits to the chosen experts and their scores, and back to gradients of logits.

Tokens are in lanes and experts in sublanes, so that a token's experts are compared register by register: one pass over
the experts per chosen one, where XLA sorts them all. Each grid step takes a tile of tokens; the last may be short.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.model.config import ModelConfig
from llada_jax.model.rows_kernel import LANES, SUBLANES, TILE, registers


def fits(config: ModelConfig) -> bool:
    """Whether `select` supports a config: each group of experts fills whole registers, and tokens are routed singly."""
    return config.num_experts // config.num_groups % SUBLANES == 0 and not config.routing_block


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def select(
    logits: jax.Array, bias: jax.Array | None, config: ModelConfig, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns experts int32 and their scores float32, both [k, tokens], as router.route chooses them. Needs
    fits(config).

    logits [experts, tokens] float32; bias [experts] float32 or None, which gets no gradient. The results, and the
    logits where the gradient needs them ("softmax"), are saved by the remat name "routing".
    """
    return _forward(logits, bias, config, interpret)[0]


def _forward(logits, bias, config, interpret):
    experts, scores = (checkpoint_name(x, "routing") for x in choose(logits, bias, config, interpret))
    # The derivative of a sigmoid is one of its value alone.
    saved_logits = checkpoint_name(logits, "routing") if config.router == "softmax" else None
    return (experts, scores), (experts, scores, saved_logits)


def _backward(config, interpret, residuals, cotangents):
    experts, scores, logits = residuals
    return gradient(experts, scores, cotangents[1], logits, config, interpret), None


select.defvjp(_forward, _backward)


def choose(
    logits: jax.Array, bias: jax.Array | None, config: ModelConfig, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `select`, which has a gradient."""
    shape = config.num_experts_per_token, logits.shape[1]
    operands, specs = [logits], [_tiles(logits.shape)]
    if bias is not None and config.router == "sigmoid":
        operands.append(jnp.broadcast_to(bias[:, None], (len(bias), LANES)))
        specs.append(pl.BlockSpec(operands[1].shape, lambda i: (0, 0)))
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32)]
    kernel = functools.partial(_selection_kernel, config)
    return _call(kernel, "router_selection_forward", specs, results, interpret)(*operands)


def gradient(
    experts: jax.Array,
    scores: jax.Array,
    d_scores: jax.Array,
    logits: jax.Array | None,
    config: ModelConfig,
    interpret: bool = False,
) -> jax.Array:
    """Of the logits [experts, tokens]; experts, scores, d_scores [k, tokens]; logits: None for "sigmoid"."""
    operands = [x for x in (experts, scores, d_scores, logits) if x is not None]
    (result,) = _call(
        _gradient_kernel,
        "router_selection_backward",
        [_tiles(x.shape) for x in operands],
        [jax.ShapeDtypeStruct((config.num_experts, experts.shape[1]), jnp.float32)],
        interpret,
    )(*operands)
    return result


def _tile(tokens: int) -> int:
    return min(TILE, pl.cdiv(tokens, LANES) * LANES)


def _tiles(shape: tuple[int, int]) -> pl.BlockSpec:
    """Of an array [rows, tokens]."""
    return pl.BlockSpec((shape[0], _tile(shape[1])), lambda i: (0, i))


def _call(kernel, name, in_specs, results, interpret):
    """Over tiles of the tokens, which the cores share."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(pl.cdiv(results[0].shape[1], _tile(results[0].shape[1])),),
        in_specs=in_specs,
        out_specs=[_tiles(x.shape) for x in results],
        out_shape=results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
    )


def _strips(tile: int):
    """Slices of one register's lanes each, so that the live values nearly fit the registers."""
    return [pl.ds(start, LANES) for start in range(0, tile, LANES)]


def _selection_kernel(config, logits_ref, *refs):
    *bias_ref, experts_ref, scores_ref = refs
    bias = registers(bias_ref[0][...]) if bias_ref else None
    for strip in _strips(logits_ref.shape[1]):
        logits = registers(logits_ref[:, strip])
        if config.router == "softmax":
            ranking = scores = _softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            ranking = scores if bias is None else scores + bias
            ranking = _limit_to_groups(ranking, config.num_groups, config.num_selected_groups)
        experts_ref[:, strip], scores_ref[:, strip] = _largest(ranking, scores, config.num_experts_per_token)


def _gradient_kernel(experts_ref, scores_ref, cotangents_ref, *refs):
    *logits_ref, d_logits_ref = refs
    for strip in _strips(d_logits_ref.shape[1]):
        experts, scores, d_scores = experts_ref[:, strip], scores_ref[:, strip], cotangents_ref[:, strip]
        if logits_ref:
            probabilities = _softmax(registers(logits_ref[0][:, strip]))
            mean = jnp.sum(scores * d_scores, axis=0, keepdims=True)
            d_logits = probabilities * (_at_experts(experts, d_scores, probabilities.shape) - mean[None])
        else:
            shape = d_logits_ref.shape[0] // SUBLANES, SUBLANES, LANES
            d_logits = _at_experts(experts, d_scores * scores * (1 - scores), shape)
        d_logits_ref[:, strip] = d_logits.reshape(-1, LANES)


def _sublane(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)


def _softmax(logits: jax.Array) -> jax.Array:
    exponentials = jnp.exp(logits - logits.max(axis=(0, 1), keepdims=True))
    return exponentials / exponentials.sum(axis=(0, 1), keepdims=True)


def _at_experts(experts: jax.Array, values: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Scatters `values` [k, lanes] to the experts `experts` [k, lanes]: an array of `shape`, zero elsewhere."""
    first_expert = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * SUBLANES
    result = jnp.zeros(shape, values.dtype)
    for expert, value in zip(jnp.split(experts, len(experts)), jnp.split(values, len(values)), strict=True):
        of_register = expert - _sublane(shape[1:])
        result = jnp.where(of_register[None] == first_expert, value[None], result)
    return result


def _limit_to_groups(ranking: jax.Array, groups: int, selected: int) -> jax.Array:
    if groups == 1:
        return ranking
    grouped = ranking.reshape(groups, -1, *ranking.shape[1:])
    score = _sum_of_two_best(grouped)
    # How many groups go before each one.
    before = [
        sum(jnp.where(score[h] >= score[g] if h < g else score[h] > score[g], 1, 0) for h in range(groups) if h != g)
        for g in range(groups)
    ]
    limited = [jnp.where(before[g][None] < selected, grouped[g], -jnp.inf) for g in range(groups)]
    return jnp.concatenate(limited)


def _sum_of_two_best(x: jax.Array) -> jax.Array:
    """[groups, registers, sublanes, lanes] -> [groups, sublanes, lanes], all sublanes alike."""
    best, second = x[:, 0], jnp.full_like(x[:, 0], -jnp.inf)
    for i in range(1, x.shape[1]):
        second = jnp.maximum(second, jnp.minimum(best, x[:, i]))
        best = jnp.maximum(best, x[:, i])
    for shift in (4, 2, 1):
        other_best, other_second = pltpu.roll(best, shift, 1), pltpu.roll(second, shift, 1)
        second = jnp.maximum(jnp.minimum(best, other_best), jnp.maximum(second, other_second))
        best = jnp.maximum(best, other_best)
    return best + second


def _largest(ranking: jax.Array, scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices of the k largest (int32, of equals the first) and their `scores` (float32), [k, lanes]."""
    registers, _, lanes = ranking.shape
    last = registers * SUBLANES - 1
    sublane = _sublane((SUBLANES, lanes))
    first_expert = jax.lax.broadcasted_iota(jnp.int32, ranking.shape, 0) * SUBLANES
    experts, chosen = [], []
    for _ in range(k):
        best, best_score, best_expert = _first_largest(ranking, scores, first_expert)
        best_expert += sublane
        is_best = best == best.max(axis=0, keepdims=True)
        # Where all are NaN there is none.
        expert = jnp.minimum(jnp.where(is_best, best_expert, last).min(axis=0, keepdims=True), last)
        experts.append(expert)
        chosen.append(jnp.where(best_expert == expert, best_score, 0).sum(axis=0, keepdims=True))
        ranking = jnp.where((expert - sublane)[None] == first_expert, -jnp.inf, ranking)
    return jnp.concatenate(experts), jnp.concatenate(chosen)


def _first_largest(values: jax.Array, *others: jax.Array) -> list[jax.Array]:
    """Returns the largest of `values` along axis 0 (of equals, the first) and the entries of `others` there."""
    arrays = [values, *others]
    while (n := len(arrays[0])) > 1:
        paired = n // 2 * 2
        pairs = [x[:paired].reshape(-1, 2, *x.shape[1:]) for x in arrays]
        second = pairs[0][:, 1] > pairs[0][:, 0]
        winners = [jnp.where(second, x[:, 1], x[:, 0]) for x in pairs]
        if n % 2:
            winners = [jnp.concatenate([won, x[paired:]]) for won, x in zip(winners, arrays, strict=True)]
        arrays = winners
    return [x[0] for x in arrays]
