"""Checks of what users pass to `forward` and `denoise`: shapes, dtypes, token ids, documents, the mask's name."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llada_jax.attention.visibility import check_contiguous
from llada_jax.model.config import ModelConfig


def block_size_of(mask: str | tuple[str, int], length: int) -> int:
    """Block size of a `forward` mask over rows of `length` tokens. Raises ValueError on an unknown mask."""
    if mask == "full":
        return length
    if mask == "causal":
        return 1
    if isinstance(mask, tuple | list) and len(mask) == 2 and mask[0] == "block_causal" and mask[1] >= 1:
        return mask[1]
    raise ValueError(f'mask={mask!r}, expected "full", "causal" or ("block_causal", block_size)')


def checked_inputs(
    config: ModelConfig, named_tokens: dict[str, ArrayLike], segment_ids: ArrayLike | None, positions: ArrayLike | None
) -> tuple[tuple[jax.Array, ...], jax.Array | None, jax.Array | None]:
    """Returns (tokens, segment_ids, positions) as int32 arrays [batch, length]; tokens is a tuple, None stays None.

    Values are checked in concrete arrays only: those of traced ones are unknown. Raises ValueError naming the argument.
    """
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
            check_contiguous(value)
        arrays.append(jnp.asarray(value, jnp.int32))
    tokens = tuple(arrays[: len(named_tokens)])
    rest = iter(arrays[len(named_tokens) :])
    return tokens, *(None if value is None else next(rest) for value in optional.values())
