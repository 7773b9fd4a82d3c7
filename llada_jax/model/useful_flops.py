"""The FLOPs that a training step needs, from the preset and the data alone: no remat, no padding, no masked-out pair.

A position costs 2 FLOPs per weight it is multiplied with, a query-key pair that the mask allows 4 per channel and head,
a masked token 2 per weight of the head. Training costs three forward passes. Block diffusion has 2 L positions per row
(noisy and clean), MDLM and AR have L.
"""

import numpy as np

from llada_jax.attention.visibility import Visibility
from llada_jax.model.config import ModelConfig

MASKED_SHARE = 0.5  # of the tokens, on average, with t uniform


def layer_weights(config: ModelConfig) -> dict[str, int]:
    """Returns {"dense", "sparse": weights that one token is multiplied with in such a layer}."""
    c, d = config, config.hidden_size
    attention = d * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.num_heads * c.head_dim * d
    weights = {"dense": attention + 3 * d * c.intermediate_size}
    if c.is_moe:
        met = c.num_experts_per_token + c.num_shared_experts
        weights["sparse"] = attention + 3 * d * c.moe_intermediate_size * met + d * c.num_experts
    return weights


def allowed_pairs(visibility: Visibility) -> int:
    """Returns the number of query-key pairs that the mask allows, in all rows together."""
    noisy = np.maximum(np.asarray(visibility.noisy_end) - np.asarray(visibility.noisy_start), 0)
    clean = np.maximum(np.asarray(visibility.clean_end) - np.asarray(visibility.clean_start), 0)
    return int(noisy.sum(dtype=np.int64) + clean.sum(dtype=np.int64))


def mean_pairs(segment_ids: np.ndarray, block_size: int, halves: str, block_origin: str = "global") -> float:
    """Returns the mean of allowed_pairs per row in a training pass over packed rows; counted on the host.

    segment_ids int [rows, length], 0 is padding. halves, block_size: as in schedule.Phase.
    """
    rows, length = segment_ids.shape
    index = np.broadcast_to(np.arange(length), segment_ids.shape)
    first = np.ones(segment_ids.shape, bool)
    first[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]) | (segment_ids[:, 1:] == 0)
    last = np.roll(first, -1, axis=1)  # the first position of a row always begins a document
    start = np.maximum.accumulate(np.where(first, index, 0), axis=1)
    end = np.minimum.accumulate(np.where(last, index + 1, length)[:, ::-1], axis=1)[:, ::-1]
    origin = start if block_origin == "document" else 0
    block_end = np.minimum(end, origin + (index - origin) // block_size * block_size + block_size)
    # A clean token sees its document up to the end of its block; a noisy one as many: its block, and what is before.
    return float((block_end - start).sum()) * (2 if halves == "both" else 1) / rows


def useful_flops(
    config: ModelConfig, rows: int, length: int, halves: str, pairs_per_row: float, scored_share: float = MASKED_SHARE
) -> float:
    """Returns the useful FLOPs of a training step over `rows` rows of `length` tokens; halves as in schedule.Phase.
    scored_share: of the tokens, those that the head scores in a pass with noisy tokens.
    """
    positions = length * (2 if halves == "both" else 1)
    weights = layer_weights(config)
    matmul = 2 * positions * sum(weights[group] * len(layers) for group, layers in config.layer_groups.items())
    attention = 4 * config.num_heads * config.head_dim * pairs_per_row * config.num_layers
    scored = length * (1.0 if halves == "clean" else scored_share)
    head = 2 * config.hidden_size * config.vocab_size * scored
    return 3.0 * rows * (matmul + attention + head)
