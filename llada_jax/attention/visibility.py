"""What each query may see: one interval of the clean keys and one interval of the noisy keys.

Every mask of the project has this form, so a mask is four integers per query and never an [L, L] array. Block size,
document boundaries and the phase of the curriculum are then run-time values of one compiled program. The dense oracle,
the blockwise path and the kernels all read these intervals. A mask is made in two steps: `make_layout` (bounds of
documents and blocks), then one of the constructors below it.

Documents are runs of equal segment ids. Segment 0 is padding: a padding position sees only itself, nothing sees it.
Blocks count from the start of the row (`block_origin="global"`, Eq. 3 of the paper: b(k) = floor(k / B), intersected
with the document) or from the start of each document (`block_origin="document"`).
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

BLOCK_ORIGINS = ("global", "document")


@flax.struct.dataclass
class Visibility:
    """Half-open key intervals of each query; an empty interval has start >= end.

    clean_start, clean_end, noisy_start, noisy_end: [batch, queries] int32. Noisy keys come first: key j < num_noisy is
    noisy key j, key num_noisy + j is clean key j.
    """

    clean_start: jax.Array
    clean_end: jax.Array
    noisy_start: jax.Array
    noisy_end: jax.Array
    num_noisy: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Layout:
    """Bounds of the document and the block that each position belongs to, half-open row indices, [batch, length] int32.

    No block crosses the end of its document, so the last block of a document may be short. group_start: of the first of
    the blocks that are denoised together with this one (diffusion/groups.py); block_start where each is alone.
    """

    document_start: jax.Array
    document_end: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    group_start: jax.Array


def make_layout(segment_ids: jax.Array, block_size: jax.Array | int, block_origin: str = "global") -> Layout:
    """Returns the document and block bounds of each position, each block alone in its group.

    segment_ids [batch, length] int. block_size: may be traced. block_origin: see the module's docstring. Raises
    ValueError on an unknown block_origin.
    """
    if block_origin not in BLOCK_ORIGINS:
        raise ValueError(f"block_origin={block_origin!r}, expected one of {BLOCK_ORIGINS}")
    length = segment_ids.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids.shape)
    # A padding position is a document of its own.
    differs = (segment_ids[:, 1:] != segment_ids[:, :-1]) | (segment_ids[:, 1:] == 0)
    first = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
    origin = start if block_origin == "document" else jnp.zeros_like(start)
    block_size = jnp.asarray(block_size, jnp.int32)
    block = origin + (index - origin) // block_size * block_size
    # block_size may be as large as int32 allows ("one block"): keep the sum in range.
    block_end = jnp.minimum(end, block + jnp.minimum(block_size, length))
    block_start = jnp.maximum(block, start)
    return Layout(start, end, block_start, block_end, group_start=block_start)


def block_causal(layout: Layout) -> Visibility:
    """One stream of clean tokens: each sees its document up to the end of its own block.

    Block size 1 is causal attention; block size = length is bidirectional attention (MDLM, Eq. 4). L = 4, B = 2:

        q\\k 0 1 2 3
        0   x x . .
        1   x x . .
        2   x x x x
        3   x x x x
    """
    nothing = jnp.zeros_like(layout.block_end)
    return Visibility(layout.document_start, layout.block_end, nothing, nothing, num_noisy=0)


def block_diffusion(layout: Layout) -> Visibility:
    """The two-stream mask of Eq. 3 over [x_t | x_0], noisy half first. L = 4, B = 2:

              noisy    clean
        q\\k   0 1 2 3  0 1 2 3
        n0    x x . .  . . . .     a noisy token sees its own noisy block ...
        n1    x x . .  . . . .
        n2    . . x x  x x . .     ... and the clean blocks before it
        n3    . . x x  x x . .
        c0    . . . .  x x . .     a clean token sees clean blocks up to its own
        c1    . . . .  x x . .
        c2    . . . .  x x x x
        c3    . . . .  x x x x

    all within one document. There are 2L queries and 2L keys. Blocks that are denoised together, in groups, see the
    noisy blocks of their group up to their own, and the clean blocks before the group. L = 4, B = 1, groups of 2:

              noisy    clean
        q\k   0 1 2 3  0 1 2 3
        n0    x . . .  . . . .
        n1    x x . .  . . . .
        n2    . . x .  x x . .
        n3    . . x x  x x . .
    """
    nothing = jnp.zeros_like(layout.block_end)

    def both(noisy, clean):
        return jnp.concatenate([noisy, clean], axis=1)

    return Visibility(
        clean_start=both(layout.document_start, layout.document_start),
        clean_end=both(layout.group_start, layout.block_end),
        noisy_start=both(layout.group_start, nothing),
        noisy_end=both(layout.block_end, nothing),
        num_noisy=layout.block_end.shape[1],
    )


def block_window(starts: jax.Array, block_size: int, length: int | None = None) -> Visibility:
    """Decoding: the queries are one block per row, or `length` tokens in blocks from the first on, block-causal among
    themselves: a chunk of a prompt. Their own keys count as noisy, those of the cache as clean.

    starts [batch] int32: number of cached positions that the queries may see (all before them).
    """
    length = block_size if length is None else length
    zeros = jnp.zeros((starts.shape[0], length), jnp.int32)
    block_end = (jnp.arange(length, dtype=jnp.int32) // block_size + 1) * block_size
    noisy_end = jnp.broadcast_to(jnp.minimum(block_end, length), zeros.shape)
    return Visibility(zeros, zeros + starts[:, None], zeros, noisy_end, num_noisy=length)


def two_block_window(starts: jax.Array, block_size: int, in_cache: jax.Array) -> Visibility:
    """Decoding with a commit: the queries are the finished block before `starts` and the block at `starts`.

    starts [batch] int32. in_cache [batch] bool: the finished block is in the cache already; otherwise the second block
    sees it among the window's own keys. B = 2, cached | window:

            not in cache       in cache
        q\\k  ..c | p p n n    ..c p p | p p n n
        p     x x   x x . .    x x . .   x x . .
        n     x x   x x x x    x x x x   . . x x
    """
    second = jnp.arange(2 * block_size)[None] >= block_size
    before = jnp.maximum(starts - block_size, 0)
    clean_end = jnp.where(second & in_cache[:, None], starts[:, None], before[:, None])
    noisy_start = jnp.where(second & in_cache[:, None], block_size, 0)
    noisy_end = jnp.where(second, 2 * block_size, block_size) + jnp.zeros_like(clean_end)
    return Visibility(jnp.zeros_like(clean_end), clean_end, noisy_start, noisy_end, num_noisy=2 * block_size)


def dense_mask(visibility: Visibility, num_keys: int) -> jax.Array:
    """Returns the mask as bool [batch, queries, num_keys]; for the dense oracle, pictures and tests."""
    key = jnp.arange(num_keys)
    noisy = key < visibility.num_noisy
    position = jnp.where(noisy, key, key - visibility.num_noisy)[None, None]

    def inside(start, end):
        return (position >= start[..., None]) & (position < end[..., None])

    return jnp.where(
        noisy[None, None],
        inside(visibility.noisy_start, visibility.noisy_end),
        inside(visibility.clean_start, visibility.clean_end),
    )


def block_diffusion_mask(
    length: int, block_size: int, segment_ids: ArrayLike | None = None, block_origin: str = "global"
) -> np.ndarray:
    """Returns the mask of Eq. 3 as numpy bool [2 * length, 2 * length]; rows are queries, the noisy half comes first.

    segment_ids int [length]: document numbers from 1, each document contiguous; 0 is padding. None: one document.
    block_origin: blocks count from the start of the row ("global") or of each "document". Raises ValueError if a size
    is not positive, or segment_ids has another length or a document in several pieces.

    Example:
        >>> import llada_jax
        >>> llada_jax.block_diffusion_mask(4, block_size=2)[0].astype(int)  # noisy token 0: its own block alone
        array([1, 1, 0, 0, 0, 0, 0, 0])
        >>> llada_jax.block_diffusion_mask(4, block_size=2)[3].astype(int)  # noisy token 3: and the clean block before
        array([0, 0, 1, 1, 1, 1, 0, 0])
    """
    if length < 1 or block_size < 1:
        raise ValueError(f"length={length} and block_size={block_size} must be positive")
    segments = np.ones(length, np.int32) if segment_ids is None else np.asarray(segment_ids, np.int32)
    if segments.shape != (length,):
        raise ValueError(f"segment_ids has shape {segments.shape}, expected ({length},)")
    check_contiguous(segments[None])
    layout = make_layout(jnp.asarray(segments)[None], block_size, block_origin)
    return np.asarray(dense_mask(block_diffusion(layout), 2 * length)[0])


def check_contiguous(segment_ids: np.ndarray) -> None:
    """Raises ValueError if a document of segment_ids [batch, length] is not contiguous, or an id is negative."""
    if segment_ids.min(initial=0) < 0:
        raise ValueError(f"segment_ids holds {segment_ids.min()}; 0 is padding and documents count from 1")
    for row, segments in enumerate(segment_ids):
        runs = segments[np.flatnonzero(np.diff(segments, prepend=-1))]
        runs = runs[runs > 0]
        if len(np.unique(runs)) != len(runs):
            raise ValueError(f"segment_ids: row {row} has a document in several pieces")
