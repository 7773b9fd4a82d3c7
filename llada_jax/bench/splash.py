"""The baselines: the unmodified splash kernel of tokamax (0.0.12), in two ways.

static  the mask of Eq. 3 as splash's own static mask, documents as segment ids; tiles of other documents are visited.
tiles   a list of tiles built at run time from the documents, so that tiles of other documents cost nothing.

Both use tiles of 512 x 512 and reduce dq in three buffers, splash's best configuration for long rows. Every tile
compares segment ids element by element, so a full tile is correct for any documents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tokamax._src.ops.experimental.tpu.splash_attention import base, splash_attention_kernel
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from llada_jax.pod.packings import KernelCounts

TILE = 512
EMPTY, PARTIAL, FULL = 0, 1, 2  # splash's own codes of a tile
# The kernels' `pl.when` regions in program order.
REGIONS = {"forward": ("init", "full", "partial", "write"), "backward": ("init", "full", "partial", "write", "add")}


def mask_function(length: int, block_size: int, query: jax.Array, key: jax.Array) -> jax.Array:
    """Eq. 3 for positions in the doubled row, noisy half first; broadcastable int32 arrays -> bool."""
    select = np.where if isinstance(query, np.ndarray) else jnp.where
    noisy_query, noisy_key = query < length, key < length
    query_block = select(noisy_query, query, query - length) // block_size
    key_block = select(noisy_key, key, key - length) // block_size
    return (
        (noisy_query & noisy_key & (query_block == key_block))
        | (noisy_query & ~noisy_key & (query_block > key_block))
        | (~noisy_query & ~noisy_key & (query_block >= key_block))
    )


@functools.cache
def static_tiles(length: int, block_size: int, tile: int) -> np.ndarray:
    """The class of every tile of the mask for a single document, int32 [query tiles, key tiles]."""
    position = np.arange(2 * length, dtype=np.int32)
    tiles = [
        [mask_function(length, block_size, rows[:, None], keys[None]) for keys in position.reshape(-1, tile)]
        for rows in position.reshape(-1, tile)
    ]
    return np.array([[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles], np.int32)


def tile_list(classes: jax.Array, segments: jax.Array, tile: int, by_key: bool) -> MaskInfo:
    """The tiles to visit, ordered by query tile (forward) or by key tile (backward).

    classes [query tiles, key tiles] int32; segments [2 * length] int32, ascending in each half. In the backward pass, a
    key tile without work keeps one empty tile, so that its gradient is written.
    """
    low, high = (f(segments.reshape(-1, tile), axis=1) for f in (jnp.min, jnp.max))
    share_documents = (low[:, None] <= high[None]) & (low[None] <= high[:, None])
    classes = jnp.where(share_documents, classes, EMPTY)
    if by_key:
        classes = classes.T
    active = classes > EMPTY
    if by_key:
        active = active.at[:, 0].set(active[:, 0] | ~active.any(axis=1))
    rows, columns = jnp.argwhere(active, size=active.size, fill_value=-1).astype(jnp.int32).T
    count = active.sum(dtype=jnp.int32)
    visited = jnp.where(jnp.arange(active.size) < count, classes[rows, columns], EMPTY)
    return MaskInfo(
        mask_next=None, active_rows=rows, active_cols=columns, block_mask=visited, num_active_blocks=count[None],
        partial_mask_blocks=None, q_sequence=jnp.arange(segments.size, dtype=jnp.int32),
    )  # fmt: skip


def tile_lists(length: int, block_size: int, segments: jax.Array, static: bool, tile: int) -> tuple[MaskInfo, MaskInfo]:
    """The tile lists of the forward and the backward pass. segments [length] int32."""
    both_halves = jnp.concatenate([segments, segments])
    classes = jnp.asarray(static_tiles(length, block_size, tile))
    documents = jnp.zeros_like(both_halves) if static else both_halves
    return tuple(tile_list(classes, documents, tile, by_key) for by_key in (False, True))


def kernel_program(length: int, heads: int, kv_heads: int, head_dim: int, block_size: int, static: bool):
    """(attend(query, key, value, mask), abstract query, key and value, abstract mask) of one row."""
    q, k = (jax.ShapeDtypeStruct((n, 2 * length, head_dim), jnp.bfloat16) for n in (heads, kv_heads))
    segments = jax.ShapeDtypeStruct((length,), jnp.int32)
    lists = jax.eval_shape(lambda x: tile_lists(length, block_size, x, static, TILE), segments)

    def attend(query, key, value, mask):
        return attention(query, key, value, *mask, block_size)

    return attend, (q, k, k), (lists, segments)


def attention(query, key, value, lists, segments, block_size: int, tile: int = TILE, interpret=False) -> jax.Array:
    """query [heads, 2 * length, head_dim], key and value [kv_heads, ...], segments [length] -> as query."""
    config = splash_attention_kernel.SplashConfig(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, dq_reduction_steps=3, interpret=interpret
    )
    kernel = splash_attention_kernel.SplashAttentionKernel(
        *lists, config=config, is_mqa=False, save_residuals=False, mask_value=base.DEFAULT_MASK_VALUE,
        mask_function=functools.partial(mask_function, segments.size, block_size),
        fwd_mask_sparsity=0.25, dkv_mask_sparsity=0.25,
    )  # fmt: skip
    both_halves = jnp.concatenate([segments, segments])
    return kernel(query * query.shape[-1] ** -0.5, key, value, base.SegmentIds(both_halves, both_halves))


def kernel_counts(
    lists: tuple[MaskInfo, MaskInfo], direction: str, heads: int, kv_heads: int, head_dim: int
) -> KernelCounts:
    """What a pass over tile lists executes. A block is copied if its index changes from one step to the next."""
    info = jax.tree.map(np.asarray, lists[direction == "backward"])
    count = int(info.num_active_blocks[0])
    rows, columns, classes = (x[:count] for x in (info.active_rows, info.active_cols, info.block_mask))
    new_rows, new_columns = (1 + int((np.diff(x) != 0).sum()) for x in (rows, columns))
    regions = {
        "full": int((classes == FULL).sum()) * heads,
        "partial": int((classes == PARTIAL).sum()) * heads,
        "init": new_rows * heads,
        "write": new_rows * heads,
        "step": count * heads,
    }
    lanes, sublanes = TILE * 128 * 4, TILE * 8 * 4  # an int32 or float32 per row, spread over a register's lanes
    block = TILE * head_dim * 2
    if direction == "forward":
        # q, its segments and positions, out, log-sum-exp, maximum; k, v, their segments.
        moved = new_rows * (2 * block + 4 * lanes) + new_columns * (2 * block + sublanes)
    else:
        # Float32 gradients of k and v are read and added to by all heads of a group but the first.
        regions |= {"write": new_rows * kv_heads, "add": new_rows * (heads - kv_heads)}
        # k, v, their segments, dk, dv in and out; q, do, dq in and out, four values per row.
        moved = new_rows * (2 * block + lanes + 8 * block) + new_columns * (4 * block + 4 * sublanes)
    return KernelCounts(regions, launches=1, dma_bytes=moved * heads, tile_pairs=TILE * TILE)
