"""Which path computes the attention of a pass: one of ATTENTIONS, and over a cache its counterpart in decoding/."""

import functools

from llada_jax import sharding
from llada_jax.attention import context
from llada_jax.attention.blockwise import blockwise_attention
from llada_jax.attention.decoding import prefix
from llada_jax.attention.decoding.cached import cached_attention
from llada_jax.attention.decoding.cached_kernel import cached_kernel_attention, make_plan
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.kernel import kernel_attention, kernel_plan
from llada_jax.attention.rotary import QueryKeyRotary
from llada_jax.attention.visibility import Visibility
from llada_jax.errors import InputError

# "kernel" runs on TPUs, the others anywhere.
ATTENTIONS = ("dense", "blockwise", "kernel")


def attention_of(config, execution, visibility: Visibility, num_keys: int, cache: dict | None = None):
    """Returns (attention(query, key, value, rotary=QueryKeyRotary()), number of queries); with a cache, attention takes
    also the cached keys, the cached values and the layer.

    config: a model.config.ModelConfig; execution: a model.forward.Execution. cache: of a group of layers, {"key",
    "value"}. All that depends on the mask alone is made here, once for all layers. rotary: the norm and rotation that
    query and key still need. Raises InputError for dense attention with a context axis.
    """
    queries, group = visibility.clean_start.shape[1], sharding.group_size(config.num_heads, config.num_kv_heads)
    if cache is not None:
        return _over_cache(config, execution, visibility, group, cache["key"].shape[3]), queries
    crosses = context.blocks_cross(visibility)
    if execution.attention == "kernel":
        plan = kernel_plan(visibility, num_keys, group, config.head_dim, execution.interpret)
        attend = functools.partial(kernel_attention, plan=plan, interpret=execution.interpret, crosses=crosses)
    elif execution.attention == "blockwise":
        attend = _rotated_first(functools.partial(blockwise_attention, visibility=visibility, crosses=crosses))
    elif crosses is not None:
        raise InputError(f"attention='dense' with mesh.context={context.ranks()}, expected 'blockwise' or 'kernel'")
    else:
        attend = _rotated_first(functools.partial(dense_attention, visibility=visibility))
    return attend, queries


def _over_cache(config, execution, visibility, group, length):
    """length: positions of the cache."""
    if execution.attention != "kernel":
        return _rotated_first(functools.partial(cached_attention, visibility=visibility))
    how = dict(interpret=execution.interpret)
    rows, queries = visibility.clean_start.shape
    if prefix.takes(queries, rows, group):
        plan = prefix.make_plan(visibility, length, group, config.head_dim, **how)
        return functools.partial(prefix.prefix_attention, plan=plan, **how)
    return _rotated_first(functools.partial(cached_kernel_attention, plan=make_plan(visibility, length, group), **how))


def _rotated_first(attention):
    return lambda query, key, *others, rotary=QueryKeyRotary(): attention(*rotary.apply(query, key), *others)
