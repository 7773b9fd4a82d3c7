"""RMSNorm and rotation of the heads of one tile, inside a kernel: rotary.RotaryNorm and its transpose, in float32.

    y = r (x w C + P(x) P(w) S)

r = 1 / rms(x); w: the weight of RMSNorm; C, S: the cosines and the signed sines of the channels, times a scale; P: the
halves of a rotation change places. Sums over channels cross lanes, which takes a TPU's vector units longer than all the
rest: where x is bfloat16, the matrix unit makes them. It multiplies bfloat16, so that a float32 goes as two, which hold
16 bits of it: all of a bfloat16 squared.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.rotary import RotaryNorm


def tile_rotary(rotary: RotaryNorm | None, refs, positions: slice, group: int, scale: float, head_dim: int):
    """.forward and .backward, as _TileRotary's; without a rotation they scale only."""
    return _Scale(scale) if rotary is None else _TileRotary(rotary, refs, positions, group, scale, head_dim)


class _Scale(NamedTuple):
    scale: float

    def forward(self, x):
        return x if self.scale == 1 else x.astype(jnp.float32) * self.scale

    def backward(self, dy, x):
        return self.forward(dy), 0.0


class _TileRotary:
    """Of `group` heads at some positions, one after the other: [group * positions, head_dim]."""

    def __init__(self, rotary: RotaryNorm, refs, positions: slice, group: int, scale: float, head_dim: int):
        """refs: cos, sin [positions of a block, rotary_dim / 2] and the weight [1, head_dim], if any, all float32."""
        cos, sin, *weight = (ref[positions] if i < 2 else ref[...] for i, ref in enumerate(refs))
        self.half, self.eps = cos.shape[1], rotary.eps
        shape = len(cos), head_dim - 2 * self.half  # of the channels that are not rotated, if there are any
        ones, zeros = ([jnp.full(shape, value, jnp.float32)] if shape[1] else [] for value in (1.0, 0.0))
        tables = [_beside(cos, cos, *ones), _beside(-sin, sin, *zeros), _beside(sin, -sin, *zeros)]
        if weight:
            tables += [tables[0] * weight[0], tables[1] * _halves_exchanged(weight[0], self.half)]
        tables = [jnp.concatenate([table * scale] * group, axis=0) for table in tables]
        self.weight = weight[0] if weight else None
        self.cos, self.sin, self.sin_back, *self.weighted = tables

    def forward(self, x: jax.Array) -> jax.Array:
        cos, sin = (self.cos, self.sin) if self.weight is None else self.weighted
        y = x.astype(jnp.float32) * cos + self._exchanged(x) * sin
        return y if self.weight is None else y * self._inverse_rms(x)

    def backward(self, dy: jax.Array, x: jax.Array | None) -> tuple[jax.Array, jax.Array | float]:
        """(the gradient of x, summands of the weight's gradient: 0 without one); dy in x's dtype."""
        d_normal = dy.astype(jnp.float32) * self.cos + self._exchanged(dy) * self.sin_back
        if self.weight is None:
            return d_normal, 0.0
        inverse, weighted = self._inverse_rms(x), d_normal * self.weight
        x32 = x.astype(jnp.float32)
        mean = _means(weighted * x32, x.dtype)
        return inverse * (weighted - x32 * (jnp.square(inverse) * mean)), d_normal * x32 * inverse

    def _inverse_rms(self, x):
        return jax.lax.rsqrt(_means(jnp.square(x.astype(jnp.float32)), x.dtype) + self.eps)

    def _exchanged(self, x):
        """P(x), float32."""
        x, half, channels = x.astype(jnp.float32), self.half, x.shape[1]
        if channels % 128:
            return _halves_exchanged(x, half)
        # Whole registers are moved round more cheaply than pieces of them are put together.
        after = pltpu.roll(x, half, 1)
        if 2 * half == channels:
            return after
        channel = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        before = pltpu.roll(x, channels - half, 1)
        return jnp.where(channel < half, before, jnp.where(channel < 2 * half, after, 0.0))


def _means(x, dtype):
    """Of each row of x, float32, in one channel or in every one; to 16 bits where dtype is bfloat16."""
    if dtype == jnp.float32:
        return jnp.mean(x, axis=-1, keepdims=True)
    high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFFF, jnp.float32)
    ones = jnp.ones((x.shape[1],) * 2, jnp.float32)
    one_pass = functools.partial(jnp.dot, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    return (one_pass(high, ones) + one_pass(x - high, ones)) * (1 / x.shape[1])


def _halves_exchanged(x, half):
    rest = [jnp.zeros_like(x[:, 2 * half :])] if x.shape[1] > 2 * half else []
    return _beside(x[:, half : 2 * half], x[:, :half], *rest)


def _beside(*parts):
    return jnp.concatenate(parts, axis=1)
