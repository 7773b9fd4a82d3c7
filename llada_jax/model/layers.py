"""RMSNorm, rotary embedding (with linear, YaRN and Llama 3 scaling) and SwiGLU."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.model.config import ModelConfig, RopeScaling
from llada_jax.model.lora import adapter_names


def project(x: jax.Array, weights: dict[str, jax.Array], name: str, contracted: int = 1) -> jax.Array:
    """Returns x W over the last `contracted` axes of x, plus (x A) B if the weight has an adapter (model/lora.py).

    x [..., *in]; W [*in, *out]; A [*in, rank]; B [rank, *out], scaled. Returns [..., *out].
    """
    y = _product(x, weights[name], contracted)
    a, b = adapter_names(name)
    return y + _product(_product(x, weights[a], contracted), weights[b], 1) if a in weights else y


def _product(x, w, contracted):
    """x W as a product of matrices, so that heads stay side by side in memory, as the attention kernels take them."""
    outputs = w.shape[min(contracted, w.ndim - 1) :]  # heads of w may be joined
    if w.ndim > 2:  # or XLA would put the heads into the product, and lay them apart
        w = jax.lax.optimization_barrier(w.reshape(-1, math.prod(outputs)))
    y = _matmul(x.reshape(*x.shape[: x.ndim - contracted], -1), w)
    return y.reshape(*y.shape[:-1], *outputs)


@jax.custom_vjp
def _matmul(x, w):
    """x w, whose weight gradient is x^T dy.

    Autodiff would write it (dy^T x)^T, for which XLA on CPUs transposes what dy is computed from: the gradients of a
    SwiGLU took 2.6 to 2.9 times as long.
    """
    return x @ w


def _matmul_backward(operands, dy):
    x, w = operands
    rows = tuple(range(x.ndim - 1))
    return dy @ w.T, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


_matmul.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _matmul_backward)


def swiglu(x: jax.Array, weights: dict[str, jax.Array], prefix: str = "") -> jax.Array:
    """down(silu(gate x) * up x). x [..., embed]; the weights "{prefix}gate", up [embed, mlp]; down [mlp, embed]."""
    hidden = jax.nn.silu(project(x, weights, f"{prefix}gate")) * project(x, weights, f"{prefix}up")
    return project(hidden, weights, f"{prefix}down")


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the rotary angles at positions [batch, length] int: float32 [batch, length, rotary_dim /
    2].
    """
    frequencies, scale = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each rotated channel pair, float32 [rotary_dim / 2], and the factor on cos,
    sin.
    """
    d = config.rotary_dim
    inverse = 1.0 / config.rope_theta ** (np.arange(0, d, 2, dtype=np.float64) / d)
    scaling, scale = config.rope_scaling, 1.0
    if scaling is not None and scaling.kind == "yarn":
        inverse, scale = _yarn(inverse, config.rope_theta, scaling), 0.1 * math.log(scaling.factor) + 1.0
    elif scaling is not None and scaling.kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif scaling is not None:  # linear, arXiv 2306.15595
        inverse = inverse / scaling.factor
    return inverse.astype(np.float32), scale


def _yarn(inverse: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN (arXiv 2309.00071): slow channels are interpolated, fast ones kept, a linear ramp between."""
    d = 2 * len(inverse)

    def channel(rotations: float) -> float:
        return d * math.log(scaling.original_length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 1e-3), 0, 1)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def _llama3(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rescaling: long wavelengths divided by `factor`, short ones kept, a smooth step between."""
    rotations = scaling.original_length * inverse / (2 * np.pi)  # over the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = np.clip((rotations - scaling.low_freq_factor) / span, 0, 1)
    return inverse / scaling.factor * (1 - smooth) + inverse * smooth
