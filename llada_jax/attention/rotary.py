"""RMSNorm (QK norm) and rotary embedding (RoPE) of query and key heads, before attention."""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight * x / rms(x): normalised in float32, cast back to x's dtype, then scaled. x [..., channels]."""
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return jnp.expand_dims(weight.astype(x.dtype), range(x.ndim - 1)) * normal.astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first rotary_dim channels of each head, in halves (NeoX order); the rest pass through.

    x [batch, length, heads, head_dim]; cos, sin [batch, length, rotary_dim / 2].
    """
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


@flax.struct.dataclass
class RotaryNorm:
    """RMSNorm and rotation of every head of queries or keys. weight [head_dim]: of RMSNorm; None for none. cos, sin
    float32 [batch, length, rotary_dim / 2].
    """

    weight: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    eps: float = flax.struct.field(pytree_node=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, length, heads, head_dim]"""
        return rotate(x if self.weight is None else rms_norm(x, self.weight, self.eps), self.cos, self.sin)


class QueryKeyRotary(NamedTuple):
    """The RotaryNorm of queries and that of keys; None if not needed, or applied already."""

    query: RotaryNorm | None = None
    key: RotaryNorm | None = None

    def apply(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(x if rotary is None else rotary(x) for rotary, x in zip(self, (query, key), strict=True))
