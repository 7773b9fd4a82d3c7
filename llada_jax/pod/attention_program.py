"""Programs of our attention kernel (attention/kernel.py) for the bench and the estimator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.kernel import kernel_attention
from llada_jax.attention.plan import Plan, make_plan, step_classes
from llada_jax.attention.tiles import Tiles, device_kind, tiles_for
from llada_jax.attention.visibility import block_diffusion, block_window, make_layout
from llada_jax.pod.packings import ROWS, KernelCounts

# The branches of the kernels' loops, in program order.
REGIONS = dict.fromkeys(("forward", "backward"), ("full", "partial", "finish"))
REGIONS["decode"] = ("full", "partial")  # the end of so small a tile cannot be told from the rest of a step


@functools.partial(jax.jit, static_argnames="tiles")
def plan(segments: jax.Array, block_size: int, tiles: Tiles) -> Plan:
    """Of one row: segments [length] int32."""
    return make_plan(block_diffusion(make_layout(segments[None], block_size)), 2 * segments.size, tiles)


def decoding_plan(cached: jax.Array, length: int, block_size: int, tiles: Tiles) -> Plan:
    """Of a batch that decodes a block a row, cached [rows] int32 positions of `length` filled."""
    return make_plan(block_window(cached, block_size), block_size + length, tiles)


def kernel_program(
    length: int, heads: int, kv_heads: int, head_dim: int, block_size: int, tiles: Tiles | None, decode: bool
):
    """(attend(query, key, value, plan), abstract query, key, value, abstract plan) of a row, or a decoding batch.

    The heads of a position lie side by side, [rows, length, heads * head_dim], as projections make and take them.
    tiles: None takes the table's.
    """
    rows, queries, keys = (ROWS, block_size, block_size + length) if decode else (1, 2 * length, 2 * length)
    shapes = [(rows, queries, heads, head_dim), *[(rows, keys, kv_heads, head_dim)] * 2]
    tiles = tiles or tiles_for(device_kind(), head_dim, heads // kv_heads, queries)

    def attend(query, key, value, plan):
        apart = (x.reshape(shape) for x, shape in zip((query, key, value), shapes, strict=True))
        return kernel_attention(*apart, plan).reshape(query.shape)

    def planned(x):
        return decoding_plan(x, length, block_size, tiles) if decode else plan(x, block_size, tiles)

    mask = jax.ShapeDtypeStruct((rows if decode else length,), jnp.int32)
    arrays = tuple(jax.ShapeDtypeStruct((*shape[:2], shape[2] * head_dim), jnp.bfloat16) for shape in shapes)
    return attend, arrays, jax.eval_shape(planned, mask)


def kernel_counts(row: Plan, direction: str, heads: int, kv_heads: int, head_dim: int) -> KernelCounts:
    """What a pass ("forward" or "backward") executes for the plan of a row, or of a batch in one launch."""
    chunks = getattr(row.tiles, direction)
    classes = np.asarray(step_classes(row, chunks))
    steps, tiles = int((classes > 0).sum()), len(classes)
    regions = {
        "full": int((classes == 2).sum()) * kv_heads,
        "partial": int((classes == 1).sum()) * kv_heads,
        "finish": tiles * kv_heads,
        "step": steps * kv_heads,
    }
    rows = row.tiles.queries * heads // kv_heads
    block = rows * head_dim * 2
    # Keys and values; queries in and output (or its gradient in and theirs out); statistics and bounds of a tile.
    moved = steps * 2 * chunks * row.tiles.chunk * head_dim * 2
    moved += tiles * ((2 if direction == "forward" else 3) * block + 8 * rows + 16 * row.tiles.queries)
    if direction == "backward":
        moved += 2 * row.chunks_per_row * row.tiles.chunk * head_dim * 4
    return KernelCounts(regions, kv_heads, moved * kv_heads, tile_pairs=rows * chunks * row.tiles.chunk)
