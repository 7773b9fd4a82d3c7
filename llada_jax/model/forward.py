"""The forward pass: pure functions of (params, config, tokens).

Layers of a group are stacked and scanned. `hidden_states` is the one pass that training, likelihood and decoding
share; `forward` and `denoise` are its public forms.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import sharding
from llada_jax.attention import visibility as vis
from llada_jax.attention.blockwise import blockwise_attention
from llada_jax.attention.cached import cached_attention
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.kernel import kernel_attention, kernel_plan
from llada_jax.errors import InputError
from llada_jax.model import experts, head
from llada_jax.model.alignment import align
from llada_jax.model.config import ModelConfig
from llada_jax.model.layers import project, rms_norm, rope_angles, rotate, swiglu
from llada_jax.model.lora import weight_of

# "kernel" runs on TPUs, the others anywhere.
ATTENTIONS = ("dense", "blockwise", "kernel")
# What the backward pass of a layer may keep; the rest is recomputed.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a pass is computed, never what it computes.

    attention: a name in ATTENTIONS. remat: a name in REMAT_POLICIES. dtype: of activations; None is the parameters'.
    interpret: run the attention kernel interpreted, on any device, slowly; for tests.
    """

    attention: str = "dense"
    remat: str = "none"
    dtype: str | None = None
    interpret: bool = False

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise InputError(f"attention={self.attention!r}, expected one of {', '.join(ATTENTIONS)}")
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"remat={self.remat!r}, expected one of {', '.join(REMAT_POLICIES)}")


def hidden_states(
    params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    visibility: vis.Visibility,
    execution: Execution = Execution(),
    cache=None,
    embedding_noise: jax.Array | None = None,
):
    """Final normalised hidden states [batch, queries, embed], and the keys and values of the pass.

    tokens, positions [batch, queries] int. cache: keys and values of earlier clean tokens, {group: {"key", "value":
    [layers, batch, cached, kv_heads, head_dim]}}, which are the clean keys; the pass's own keys are then the noisy
    ones, and attention is attention/cached.py's, whatever `execution` names. embedding_noise [batch, queries, embed]
    is added to the embedding output. Second result: as `cache`, of the pass itself.
    """
    dtype = execution.dtype or params["embedding"].dtype
    x = params["embedding"][tokens].astype(dtype)
    if embedding_noise is not None:
        x = x + embedding_noise.astype(dtype)
    x = sharding.constrain(x, ("batch", None, None))
    cos, sin = rope_angles(config, positions)
    if cache is None:
        attend = _attend(config, execution, visibility, tokens.shape[1])
    else:
        attend = functools.partial(cached_attention, visibility=visibility)
    computed = {}
    for group in config.layer_groups:
        layer = functools.partial(_layer, config, group, attend, cos, sin)
        if policy := REMAT_POLICIES[execution.remat]:
            layer = jax.checkpoint(layer, policy=policy)
        group_cache = None if cache is None else cache[group]
        x, computed[group] = jax.lax.scan(layer, x, (params[group], group_cache))
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), computed


def _attend(config, execution, visibility, num_keys):
    """attention(query, key, value) of a pass; what depends on the mask only is made here, once for all layers."""
    if execution.attention == "kernel":
        group = config.num_heads // config.num_kv_heads
        plan = kernel_plan(visibility, num_keys, group, config.head_dim, execution.interpret)
        return functools.partial(kernel_attention, plan=plan, interpret=execution.interpret)
    attention = {"dense": dense_attention, "blockwise": blockwise_attention}[execution.attention]
    return functools.partial(attention, visibility=visibility)


def _layer(config, group, attend, cos, sin, x, weights_and_cache):
    weights, cache = weights_and_cache
    weights = {k: w if k in ("router", "expert_bias") else w.astype(x.dtype) for k, w in weights.items()}
    h = rms_norm(x, weights["attention_norm"], config.rms_norm_eps)
    attended, keys_values = _attention(config, attend, weights, h, cos, sin, cache)
    x = x + attended
    h = rms_norm(x, weights["mlp_norm"], config.rms_norm_eps)
    if group == "sparse":
        y = sharding.over_batch(lambda h, w: experts.moe(h.reshape(-1, h.shape[-1]), w, config).reshape(h.shape))(
            h, {name: weights[name] for name in weights if weight_of(name) in _EXPERT_WEIGHTS}
        )
    else:
        y = swiglu(h, weights)
    return sharding.constrain(x + y, ("batch", None, None)), keys_values


_EXPERT_WEIGHTS = {"router", "expert_bias", "gate", "up", "down", "shared_gate", "shared_up", "shared_down"}


def _attention(config, attend, weights, x, cos, sin, cache):
    def heads(name):
        y = project(x, weights, name)
        return y + weights[name + "_bias"][None, None] if config.qkv_bias else y

    query, key, value = heads("query"), heads("key"), heads("value")
    if config.qk_norm:
        query = rms_norm(query, weights["query_norm"], config.rms_norm_eps)
        key = rms_norm(key, weights["key_norm"], config.rms_norm_eps)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    own = {"key": key, "value": value}
    cached = () if cache is None else (cache["key"], cache["value"])
    return project(attend(query, key, value, *cached), weights, "output", contracted=2), own


def _prepare(tokens, segment_ids, positions, block_size, block_origin):
    """(segment_ids, positions, layout) of a batch; positions restart at each document unless given."""
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    where = vis.layout(segment_ids, block_size, block_origin)
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None] - where.document_start
    return segment_ids, positions, where


def denoised_hidden(
    params, config, noisy, clean, where, positions, execution=Execution(), noisy_embedding_noise=None
) -> jax.Array:
    """Hidden states [batch, length, embed] aligned with the tokens they predict; noisy or clean may be None.

    Both: the two-stream pass [x_t | x_0] of Eq. 1. Only noisy: MDLM (Eq. 2). Only clean: block-causal, as in AR.
    """
    halves = [half for half in (noisy, clean) if half is not None]
    both = len(halves) == 2
    visibility = vis.block_diffusion(where) if both else vis.block_causal(where)
    noise = noisy_embedding_noise
    if noise is not None and both:
        noise = jnp.concatenate([noise, jnp.zeros_like(noise)], axis=1)
    tokens = jnp.concatenate(halves, axis=1)
    positions = jnp.concatenate([positions] * len(halves), axis=1)
    hidden, _ = hidden_states(params, config, tokens, positions, visibility, execution, embedding_noise=noise)
    length = halves[0].shape[1]
    noisy_hidden = None if noisy is None else hidden[:, :length]
    clean_hidden = None if clean is None else hidden[:, -length:]
    return align(noisy_hidden, clean_hidden, where, config.alignment)


def forward(
    params, config: ModelConfig, tokens, mask="full", positions=None, segment_ids=None, block_origin="global",
    execution: Execution = Execution(),
) -> jax.Array:  # fmt: skip
    """Logits, float32 [batch, length, vocab], of one pass over clean tokens; position i's logits, not aligned.

    tokens [batch, length] int. mask: "full" (bidirectional), "causal", or ("block_causal", block_size).
    segment_ids [batch, length] int: packed documents, 0 is padding; nothing sees another document. positions: int,
    restart at each document unless given. Raises ValueError on a bad shape, mask or token id.
    """
    tokens, segment_ids, positions = _check_inputs(config, {"tokens": tokens}, segment_ids, positions)
    (tokens,) = tokens
    block_size = _block_size(mask, tokens.shape[1])
    return _forward(params, config, tokens, positions, segment_ids, block_size, block_origin, execution)


@functools.partial(jax.jit, static_argnames=("config", "block_origin", "execution"))
def _forward(params, config, tokens, positions, segment_ids, block_size, block_origin, execution):
    _, positions, where = _prepare(tokens, segment_ids, positions, block_size, block_origin)
    hidden, _ = hidden_states(params, config, tokens, positions, vis.block_causal(where), execution)
    return head.logits(params, config, hidden)


def denoise(
    params, config: ModelConfig, noisy, clean, *, block_size: int, segment_ids=None, positions=None,
    block_origin="global", execution: Execution = Execution(),
) -> jax.Array:  # fmt: skip
    """Logits, float32 [batch, length, vocab], of the two-stream pass [x_t | x_0] (Eq. 1), aligned to token i.

    noisy, clean [batch, length] int: a noisy block sees itself and the clean blocks before it. With
    config.alignment == "shifted" token i is scored by its predecessor (model/alignment.py). The last block of a row
    or document may be short. Raises ValueError on a bad shape or token id.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}, expected at least 1")
    tokens, segment_ids, positions = _check_inputs(config, {"noisy": noisy, "clean": clean}, segment_ids, positions)
    return _denoise(params, config, *tokens, positions, segment_ids, block_size, block_origin, execution)


@functools.partial(jax.jit, static_argnames=("config", "block_origin", "execution"))
def _denoise(params, config, noisy, clean, positions, segment_ids, block_size, block_origin, execution):
    _, positions, where = _prepare(noisy, segment_ids, positions, block_size, block_origin)
    return head.logits(params, config, denoised_hidden(params, config, noisy, clean, where, positions, execution))


def _block_size(mask, length: int) -> int:
    if mask == "full":
        return length
    if mask == "causal":
        return 1
    if isinstance(mask, tuple | list) and len(mask) == 2 and mask[0] == "block_causal" and mask[1] >= 1:
        return mask[1]
    raise ValueError(f'mask={mask!r}, expected "full", "causal" or ("block_causal", block_size)')


def _check_inputs(config, named_tokens, segment_ids, positions):
    """Same-shaped [batch, length] int32 arrays; concrete values are checked, traced ones cannot be."""
    arrays = []
    shape = np.shape(next(iter(named_tokens.values())))
    optional = {"segment_ids": segment_ids, "positions": positions}
    for name, value in (named_tokens | optional).items():
        if value is None:
            continue
        value = value if isinstance(value, jax.core.Tracer) else np.asarray(value)
        if len(shape) != 2 or 0 in shape or value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, expected [batch, length]{f' = {shape}' * bool(arrays)}")
        if not np.issubdtype(value.dtype, np.integer):
            raise ValueError(f"{name} has dtype {value.dtype}, expected an integer")
        if name in named_tokens and not isinstance(value, jax.core.Tracer):
            if value.min() < 0 or value.max() >= config.vocab_size:
                raise ValueError(f"{name} holds ids {value.min()} .. {value.max()}, vocabulary is {config.vocab_size}")
        if name == "segment_ids" and not isinstance(value, jax.core.Tracer):
            vis.check_contiguous(value)
        arrays.append(jnp.asarray(value, jnp.int32))
    tokens = tuple(arrays[: len(named_tokens)])
    rest = iter(arrays[len(named_tokens) :])
    return tokens, *(None if value is None else next(rest) for value in optional.values())
