"""Experts in int8 for decoding: half the bytes of bfloat16, where reading experts is most of a pass.

Each matrix [in, out] of an expert has a float32 scale for each output channel, max |w| / 127 over its inputs, and
w is about round(w / scale) * scale: wrong by half a scale at most. Products are taken with the integers and scaled.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.declarations import EXPERTS, SCALE, SCALES
from llada_jax.model.parameters import Params

LARGEST = 127


def quantize_experts(params: Params, config: ModelConfig, donate: bool = False) -> Params:
    """Returns the weights with the routed experts in int8, for decoding and other passes without gradients.

    "gate", "up" and "down" [layers, experts, in, out] become int8; beside each is its scale, "gate_scale", "up_scale"
    and "down_scale" [layers, experts, 1, out] float32, laid out over a mesh as its experts are. All else is shared
    with `params`. donate: each of the three stacks is deleted as soon as its integers are there, so that memory
    peaks at a sixth of the experts' bfloat16 bytes, and a layer, above the weights. Raises InputError for a dense
    model, for experts that are int8 already, and for weights that are not finite.

    Example:
        >>> import jax, llada_jax
        >>> from llada_jax.sampling.quantize import quantize_experts
        >>> config = llada_jax.preset("tiny_moe")
        >>> params = quantize_experts(llada_jax.init(config, jax.random.key(0)), config)
        >>> params["sparse"]["gate"].dtype.name, params["sparse"]["gate_scale"].dtype.name
        ('int8', 'float32')
    """
    if not config.is_moe:
        raise InputError("experts_dtype=int8: the model is dense, it has no experts")
    sparse = dict(params["sparse"])
    if has_int8_experts(params):
        raise InputError("experts_dtype=int8: the experts are int8 already")
    for name in EXPERTS:
        stack = sparse[name]
        if not isinstance(stack, jax.core.Tracer) and not _finite(stack):
            raise InputError(f"experts_dtype=int8: sparse/{name} holds weights that are not finite")
        sparse[name], sparse[name + SCALE] = _quantized(stack)
        if donate and not isinstance(stack, jax.core.Tracer):
            jax.block_until_ready(sparse[name])
            stack.delete()
    return params | {"sparse": sparse}


def has_int8_experts(params: Params) -> bool:
    """Whether the routed experts of these weights are int8; false for a dense model."""
    return SCALES[0] in params.get("sparse", {})


def _quantized(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8, like the stack, and its scales), laid out as the stack is."""
    layout = None if isinstance(stack, jax.core.Tracer) else stack.sharding
    if not isinstance(layout, NamedSharding):
        return _by_layer(stack)
    *entries, _, out = (*layout.spec, *(None,) * (stack.ndim - len(layout.spec)))
    of_scale = NamedSharding(layout.mesh, PartitionSpec(*entries, None, out))
    return jax.jit(_by_layer, out_shardings=(layout, of_scale))(stack)


@jax.jit
def _finite(stack):
    return jnp.isfinite(stack).all()


@jax.jit
def _by_layer(stack):
    return jax.lax.map(_one_layer, stack)


def _one_layer(w):
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axis=-2, keepdims=True) / LARGEST
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)  # of a channel of zeros
    return jnp.round(w / scale).astype(jnp.int8), scale
