"""Our kernel (attention/kernel.py) as the bench sees it."""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.kernel import kernel_attention
from llada_jax.attention.plan import Plan, make_plan, step_classes
from llada_jax.attention.tiles import Tiles, device_kind, tiles_for
from llada_jax.attention.visibility import block_diffusion, layout
from llada_jax.bench.rows import Walk

# The branches of the kernels' loops in program order.
REGIONS = dict.fromkeys(("forward", "backward"), ("full", "partial", "finish"))


def plan(segments: jax.Array, block_size: int, tiles: Tiles) -> Plan:
    """Of one row: segments [length] int32."""
    return make_plan(block_diffusion(layout(segments[None], block_size)), 2 * segments.size, tiles)


def program(length: int, heads: int, kv_heads: int, head_dim: int, block_size: int):
    """(attend(query, key, value, plan), abstract query, key and value, abstract plan) of one row."""
    q, k = (jax.ShapeDtypeStruct((1, 2 * length, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads))
    tiles = tiles_for(device_kind(), head_dim, heads // kv_heads, 2 * length)
    segments = jax.ShapeDtypeStruct((length,), jnp.int32)
    return kernel_attention, (q, k, k), jax.eval_shape(lambda x: plan(x, block_size, tiles), segments)


def walk(row: Plan, direction: str, heads: int, kv_heads: int, head_dim: int) -> Walk:
    """Counts a pass over the concrete plan of one row."""
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
    return Walk(regions, launches=kv_heads, dma_bytes=moved * kv_heads)
