"""The forward pass: pure functions of (params, config, tokens).

Layers of a group are stacked and scanned. `hidden_states` is the one pass that training, likelihood and decoding
share; `forward` and `denoise` are its public forms.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from llada_jax import sharding
from llada_jax.attention import context
from llada_jax.attention.decoding import layer as decoding_layer
from llada_jax.attention.decoding import prefix
from llada_jax.attention.paths import ATTENTIONS, attention_of
from llada_jax.attention.residuals import NAMES as ATTENTION_RESIDUALS
from llada_jax.attention.rotary import QueryKeyRotary, RotaryNorm, rms_norm
from llada_jax.attention.visibility import (
    Layout,
    Visibility,
    block_causal,
    block_diffusion,
    make_layout,
)
from llada_jax.errors import InputError
from llada_jax.model import experts, head, parameters
from llada_jax.model.alignment import align
from llada_jax.model.config import ModelConfig
from llada_jax.model.grouped_matmul import KERNELS
from llada_jax.model.inputs import block_size_of, checked_inputs
from llada_jax.model.layers import project, rope_angles, swiglu
from llada_jax.model.lora import weight_of
from llada_jax.model.parameters import Params, split_heads

Cache = dict[str, dict[str, jax.Array]]  # {group: {"key", "value": [layers, batch, kv_heads, positions, head_dim]}}


def _offload(saved, offloaded):
    """Keeps the values of some names, and those of others in the host's memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved, names_which_can_be_offloaded=offloaded,
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip


_keep = jax.checkpoint_policies.save_only_these_names
_ATTENTION = (*ATTENTION_RESIDUALS, "routing")  # which token goes where, and why
_PROJECTIONS = ("query", "key", "value")
# What the backward pass of a layer keeps; the rest it computes again. From "full" to "none" each keeps more.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _keep(*_ATTENTION),
    "projections": _keep(*_ATTENTION, *_PROJECTIONS),
    "hidden": _keep(*_ATTENTION, *_PROJECTIONS, "expert_hidden"),  # of experts: gate and up
    "rows": _keep(*_ATTENTION, *_PROJECTIONS, "expert_hidden", "expert_rows"),  # the experts' input too
    "none": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,  # results of plain matmuls: dense models
    # In the host's memory: as "projections"; or a layer's input too, and queries computed again for it.
    "offload": _offload(["routing"], [*ATTENTION_RESIDUALS, *_PROJECTIONS]),
    "offload_input": _offload(["routing"], ["layer_input", *ATTENTION_RESIDUALS, "key", "value"]),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a pass is computed, never what it computes.

    attention: a name in ATTENTIONS. experts: of their matmul and routing, in grouped_matmul.KERNELS. expert_parallel:
    how experts and tokens meet over a mesh, in experts.EXPERT_PARALLEL. remat: a name in REMAT_POLICIES. dtype: of
    activations and of gathered weights; None is the parameters'. reduce_dtype: in which gradients of gathered weights
    are summed over ranks; None is `dtype`, "float32" costs twice the bytes where `dtype` is "bfloat16". interpret: run
    the Pallas kernels interpreted, on any device, slowly; for tests.
    """

    attention: str = "dense"
    experts: str = "xla"
    expert_parallel: str = "gather_weights"
    remat: str = "none"
    dtype: str | None = None
    reduce_dtype: str | None = None
    interpret: bool = False

    def __post_init__(self):
        for field, choices in (
            ("attention", ATTENTIONS), ("experts", KERNELS), ("expert_parallel", experts.EXPERT_PARALLEL),
            ("remat", tuple(REMAT_POLICIES)), ("reduce_dtype", (None, "float32")),
        ):  # fmt: skip
            if (value := getattr(self, field)) not in choices:
                raise InputError(f"{field}={value!r}, expected one of {', '.join(map(str, choices))}")


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    visibility: Visibility,
    execution: Execution = Execution(),
    cache: Cache | None = None,
    embedding_noise: jax.Array | None = None,
    num_outputs: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Returns the final normalised hidden states [batch, queries, embed], and the keys and values of the pass.

    tokens, positions [batch, queries] int. cache: keys and values of earlier clean tokens. They are the clean keys
    of `visibility`, and the pass's own keys are the noisy ones; attention is then that of attention/decoding, by
    its kernel where execution.attention is "kernel". embedding_noise [batch, queries, embed] is added to the
    embeddings. num_outputs: as in run_layers. Raises InputError on a mesh with a context axis: only denoising_pass
    splits rows over it.
    """
    if context.ranks() > 1:
        raise InputError(
            f"mesh.context={context.ranks()}: expected 1, only passes of training and likelihood split rows"
        )
    return run_layers(params, config, tokens, positions, visibility, execution, cache, embedding_noise, num_outputs)[:2]


def run_layers(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, visibility: Visibility,
    execution: Execution = Execution(), cache: Cache | None = None, embedding_noise: jax.Array | None = None,
    num_outputs: int | None = None, counted: jax.Array | None = None,
) -> tuple[jax.Array, Cache, jax.Array | None]:  # fmt: skip
    """As hidden_states, plus the tokens each expert got: int32 [layers with experts, experts], None in a dense model.

    tokens, positions [batch, queries]: in a two-stream pass both halves, noisy first. num_outputs: compute hidden
    states for this many first positions only; for the others, the last layer computes keys and values alone. None: for
    all; 0: the last layer's input is returned, and its experts count nothing. counted bool [batch, queries]: the tokens
    that the load counts; None: all. With a context axis all arrays are ordered as context.to_ranks orders them.
    """
    dtype = execution.dtype or params["embedding"].dtype
    x = head.embed(params["embedding"], tokens, dtype)
    if embedding_noise is not None:
        x = x + embedding_noise.astype(dtype)
    x = sharding.constrain(x, ("batch", "length", None))
    # Computed once: XLA would do it again in every layer.
    cos, sin = jax.lax.optimization_barrier(rope_angles(config, positions))

    def layer_of(group, visibility, shared):
        attend = None
        if not shared.attention and visibility.clean_start.shape[1]:
            attend = attention_of(config, execution, visibility, tokens.shape[1], shared.cache)
        layer = functools.partial(_layer, config, group, execution, attend, cos, sin, shared, counted)
        # Without a mesh there are no gathered weights to drop, and nothing to compute again.
        if execution.remat == "none" and sharding.mesh_in_force() is None:
            return layer
        return jax.checkpoint(layer, policy=REMAT_POLICIES[execution.remat])

    *_, last = config.layer_groups
    computed, load = {}, None
    for group in config.layer_groups:
        weights, shared, layers = params[group], Shared(), None
        if cache is not None:
            axes = {k: ("layers", *axes) for k, axes in parameters.layer_axes(config, group, weights).items()}
            stacks = experts.stacks_in_place(weights, axes, execution, x.dtype) if group == "sparse" else {}
            attend = _attention_in_place(weights, config, execution, visibility, cache[group], x)
            shared = Shared(stacks, cache[group], attend)
            in_place = (*shared.experts, *(decoding_layer.PROJECTIONS if shared.attention else ()))
            weights = {name: w for name, w in weights.items() if name not in in_place}
            layers = jnp.arange(len(config.layer_groups[group]))
        stacked = weights, layers
        trim_last = num_outputs is not None and group == last
        layer = layer_of(group, visibility, shared)
        if not trim_last:
            x, (computed[group], load) = jax.lax.scan(layer, x, stacked)
        elif cache is None:
            x, (computed[group], load) = jax.lax.scan(layer, x, jax.tree.map(lambda w: w[:-1], stacked))
        else:  # without a copy of all layers but one
            x, (computed[group], load) = jax.lax.scan(functools.partial(_at_layer, layer, weights), x, layers[:-1])
        if trim_last:
            layer = layer_of(group, jax.tree.map(lambda bound: context.first(bound, num_outputs), visibility), shared)
            x, (own, own_load) = layer(*sharding.gradients_together((x, jax.tree.map(lambda w: w[-1], stacked))))
            computed[group] = jax.tree.map(_append, computed[group], own)
            load = load if own_load is None else _append(load, own_load)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), computed, load


def _at_layer(layer, weights, x, number):
    """layer(x, (its part of the stacks, number))"""
    part = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), weights)
    return layer(x, (part, number))


def _append(layers: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.concatenate([layers, last[None]])


class Shared(NamedTuple):
    """Stacks over all layers of a group, from which each layer reads its own part in place. Decoding only: nothing is
    differentiated there, and lax.scan would copy each layer's part.
    """

    experts: dict = {}
    cache: dict | None = None
    attention: Callable | None = None  # attention_layer of the group's stacks, if they can be read in place


def _attention_in_place(weights, config, execution, visibility, cache, x):
    """decoding_layer.reader of a group's weights; None without the kernel, with biases or adapters to add, or where
    attention is that of a chunk of a prompt.
    """
    added = (name for name in weights if weight_of(name) != name or name in ("query_bias", "key_bias", "value_bias"))
    rows, queries = visibility.clean_start.shape
    of_chunk = prefix.takes(queries, rows, sharding.group_size(config.num_heads, config.num_kv_heads))
    if execution.attention != "kernel" or of_chunk or any(added):
        return None
    sizes = decoding_layer.Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    return decoding_layer.reader(weights, sizes, visibility, (cache["key"], cache["value"]), x, execution.interpret)


def _layer(config, group, execution, attend, cos, sin, shared, counted, x, of_layer):
    weights, layer = of_layer
    x = checkpoint_name(x, "layer_input")
    axes = parameters.layer_axes(config, group, weights)
    routed = {k: w for k, w in weights.items() if group == "sparse" and weight_of(k) in EXPERT_WEIGHTS}
    weights = {k: w.astype(x.dtype) for k, w in weights.items() if k not in routed}
    weights = {
        k: sharding.gathered(split_heads(w, axes[k], config.head_dim), axes[k]).reshape(w.shape)
        for k, w in weights.items()
    }
    if shared.attention:
        rotary = _rotary(config, weights, cos, sin)
        attended, *own = shared.attention(x, weights["attention_norm"], layer=layer, rotary=rotary)
        keys_values = dict(zip(("key", "value"), own, strict=True))
    else:
        h = rms_norm(x, weights["attention_norm"], config.rms_norm_eps)
        attended, keys_values = _attention(config, attend, weights, h, cos, sin, shared.cache, layer)
        if attended is None:
            return x, (keys_values, None)
    x = context.first(x, attended.shape[1]) + attended
    h = rms_norm(x, weights["mlp_norm"], config.rms_norm_eps)
    if group == "sparse":
        moe = functools.partial(_moe, config=config, execution=execution)
        if shared.experts:
            stacked = parameters.layer_axes(config, group, shared.experts)
            axes |= {name: ("layers", *stacked[name]) for name in stacked} | {"layer": ()}
            routed |= shared.experts | {"layer": layer}
        if counted is not None:
            counted = context.first(counted, x.shape[1])
        x, load = sharding.over_batch(moe, axes, execution.reduce_dtype)((h, x, counted), routed)
        load = load.sum(axis=(0, 1))
    else:
        x, load = x + swiglu(h, weights), None
    return sharding.constrain(x, ("batch", "length", None)), (keys_values, load)


def _moe(inputs, weights, shards, config, execution):
    """experts.moe with two leading axes on the load (batch and length, one of each per shard)."""
    y, load = experts.moe(inputs, weights, shards, config, execution)
    return y, load[None]


EXPERT_WEIGHTS = {"router", "expert_bias", *experts.EXPERTS, "shared_gate", "shared_up", "shared_down", *experts.SCALES}


def _attention(config, attend, weights, x, cos, sin, cache, layer):
    """Returns a layer's attention output and its keys and values. `attend` may have fewer queries than x has positions:
    then the output is that of the first ones. None: no output.
    """
    attend, queries = attend or (None, None)

    def heads(name, x):
        y = project(x, weights, name)
        if y.ndim == 3:  # of joined heads; or XLA would split them in the weight, and lay it anew
            y = jax.lax.optimization_barrier(y)
        y = y.reshape(*y.shape[:2], -1)
        y = y + weights[name + "_bias"].reshape(1, 1, -1) if config.qkv_bias else y
        return checkpoint_name(y, name).reshape(*y.shape[:2], -1, config.head_dim)

    key, value, rotary = heads("key", x), heads("value", x), _rotary(config, weights, cos, sin, queries)
    own = {name: jnp.moveaxis(x, 2, 1) for name, x in {"key": rotary.key(key), "value": value}.items()}
    if attend is None:
        return None, own
    query = heads("query", context.first(x, queries))
    cached = () if cache is None else (cache["key"], cache["value"], layer)
    return project(attend(query, key, value, *cached, rotary=rotary), weights, "output", contracted=2), own


def _rotary(config, weights, cos, sin, queries=None) -> QueryKeyRotary:
    """Of a layer; queries: at this many first positions, None: at all."""
    norms = (weights["query_norm"], weights["key_norm"]) if config.qk_norm else (None, None)
    of_queries = (cos, sin) if queries is None else tuple(context.first(angle, queries) for angle in (cos, sin))
    pairs = zip(norms, (of_queries, (cos, sin)), strict=True)
    return QueryKeyRotary(*(RotaryNorm(norm, *angles, config.rms_norm_eps) for norm, angles in pairs))


def _prepare(tokens, segment_ids, positions, block_size, block_origin):
    """(segment_ids, positions, layout) of a batch; positions restart at each document unless given."""
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    layout = make_layout(segment_ids, block_size, block_origin)
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None] - layout.document_start
    return segment_ids, positions, layout


def denoised_hidden(
    params: Params, config: ModelConfig, noisy: jax.Array | None, clean: jax.Array | None, layout: Layout,
    positions: jax.Array, execution: Execution = Execution(),
) -> jax.Array:  # fmt: skip
    """The hidden states of denoising_pass, without the load."""
    return denoising_pass(params, config, noisy, clean, layout, positions, execution)[0]


def denoising_pass(
    params: Params, config: ModelConfig, noisy: jax.Array | None, clean: jax.Array | None, layout: Layout,
    positions: jax.Array, execution: Execution = Execution(), noisy_embedding_noise: jax.Array | None = None,
    counted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Returns hidden states [batch, length, embed] aligned with the tokens they predict, and the load of run_layers.

    noisy, clean, positions [batch, length] int; one half may be None. Both given: the two-stream pass [x_t | x_0] of
    Eq. 1. Only noisy: MDLM (Eq. 2). Only clean: block-causal, as in AR. noisy_embedding_noise [batch, length, embed] is
    added to the embeddings of the noisy half. counted bool [batch, length]: tokens that the load counts, in each half;
    None: all.
    """
    halves = [half for half in (noisy, clean) if half is not None]
    both = len(halves) == 2
    batch, length = halves[0].shape
    _check_routing_blocks(config, length)
    visibility = block_diffusion(layout) if both else block_causal(layout)
    visibility = jax.tree.map(lambda bound: context.to_ranks(bound.reshape(batch, -1, length)), visibility)
    noise = noisy_embedding_noise
    if noise is not None:
        noise = context.to_ranks(jnp.stack([noise, jnp.zeros_like(noise)][: len(halves)], axis=1))
    tokens = context.to_ranks(jnp.stack(halves, axis=1))
    counted = None if counted is None else context.to_ranks(jnp.stack([counted] * len(halves), axis=1))
    positions = context.to_ranks(jnp.stack([positions] * len(halves), axis=1))
    # Of the clean half's last hidden states only "shifted" models read any.
    num_outputs = length if both and config.alignment == "same" else None
    hidden, _, load = run_layers(
        params, config, tokens, positions, visibility, execution, None, noise, num_outputs, counted
    )
    hidden = context.to_positions(hidden, hidden.shape[1] // length)
    noisy_hidden = None if noisy is None else hidden[:, 0]
    clean_hidden = None if clean is None or num_outputs is not None else hidden[:, -1]
    return align(noisy_hidden, clean_hidden, layout, config.alignment), load


def _check_routing_blocks(config, length):
    """Raises InputError if a context axis would cut a block of tokens that is routed together."""
    ranks, block = context.ranks(), config.routing_block
    if ranks > 1 and block and (stripe := context.stripe_size(length, ranks)) % block:
        raise InputError(
            f"mesh.context={ranks} cuts rows into stripes of {stripe}: routing_block={block} must divide them"
        )


def forward(
    params: Params, config: ModelConfig, tokens: ArrayLike, mask: str | tuple[str, int] = "full",
    positions: ArrayLike | None = None, segment_ids: ArrayLike | None = None, block_origin: str = "global",
    execution: Execution = Execution(),
) -> jax.Array:  # fmt: skip
    """Returns the logits of one pass over clean tokens, float32 [batch, length, vocab].

    Row i of the logits belongs to position i, whatever config.alignment is: a "shifted" model predicts token i + 1
    there. tokens [batch, length] int. mask: "full" (bidirectional), "causal", or ("block_causal", block_size): a token
    sees its own block and all earlier ones. segment_ids [batch, length] int: document numbers of packed rows, from 1; 0
    is padding. A token sees its own document only. positions [batch, length] int: by default they restart at each
    document. block_origin: blocks count from the start of the row ("global", Eq. 3) or of each "document". Raises
    ValueError naming the argument on a bad shape, dtype, mask or token id.

    Example:
        >>> import jax, llada_jax
        >>> config = llada_jax.preset("tiny")
        >>> params = llada_jax.init(config, jax.random.key(0))
        >>> tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
        >>> llada_jax.forward(params, config, tokens, mask=("block_causal", 8)).shape
        (2, 32, 512)
    """
    tokens, segment_ids, positions = checked_inputs(config, {"tokens": tokens}, segment_ids, positions)
    (tokens,) = tokens
    block_size = block_size_of(mask, tokens.shape[1])
    return _forward(params, config, tokens, positions, segment_ids, block_size, block_origin, execution)


@functools.partial(jax.jit, static_argnames=("config", "block_origin", "execution"))
def _forward(params, config, tokens, positions, segment_ids, block_size, block_origin, execution):
    _, positions, layout = _prepare(tokens, segment_ids, positions, block_size, block_origin)
    hidden, _ = hidden_states(params, config, tokens, positions, block_causal(layout), execution)
    return head.logits(params, config, hidden)


def denoise(
    params: Params, config: ModelConfig, noisy: ArrayLike, clean: ArrayLike, *, block_size: int,
    segment_ids: ArrayLike | None = None, positions: ArrayLike | None = None, block_origin: str = "global",
    execution: Execution = Execution(),
) -> jax.Array:  # fmt: skip
    """Returns the logits of the two-stream pass [x_t | x_0] (Eq. 1), float32 [batch, length, vocab].

    Logits at i predict token i. With config.alignment == "shifted" they come from the hidden state of its predecessor
    (model/alignment.py). noisy, clean [batch, length] int: x_t and x_0. Each noisy block sees itself and the clean
    blocks before it. The last block of a row or document may be short. segment_ids, positions, block_origin: as in
    `forward`. Raises ValueError naming the argument on a bad shape, dtype, block size or token id.

    Example:
        >>> import jax, llada_jax
        >>> config = llada_jax.preset("tiny")
        >>> params = llada_jax.init(config, jax.random.key(0))
        >>> clean = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
        >>> noisy = clean.at[:, 1::2].set(config.mask_token_id)
        >>> llada_jax.denoise(params, config, noisy, clean, block_size=8).shape
        (2, 32, 512)
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}, expected at least 1")
    tokens, segment_ids, positions = checked_inputs(config, {"noisy": noisy, "clean": clean}, segment_ids, positions)
    return _denoise(params, config, *tokens, positions, segment_ids, block_size, block_origin, execution)


@functools.partial(jax.jit, static_argnames=("config", "block_origin", "execution"))
def _denoise(params, config, noisy, clean, positions, segment_ids, block_size, block_origin, execution):
    _, positions, layout = _prepare(noisy, segment_ids, positions, block_size, block_origin)
    return head.logits(params, config, denoised_hidden(params, config, noisy, clean, layout, positions, execution))
