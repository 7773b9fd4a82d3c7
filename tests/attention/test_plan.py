"""The kernel's work list against the classes of the dense mask, cut into the same steps by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.attention.plan import (
    CLEAN_OFFSET,
    COLUMNS,
    COUNT,
    NOISY_COUNT,
    NOISY_OFFSET,
    ROW,
    make_plan,
    step_classes,
)
from llada_jax.attention.tiles import Tiles
from llada_jax.attention.visibility import block_causal, block_diffusion, block_window, dense_mask, make_layout
from llada_jax.diffusion.groups import Groups, grouped

# Row length and tile sizes: few, because each is a compilation.
SIZES = [(24, Tiles(8, 2, 3, chunk=8)), (37, Tiles(4, 1, 2, chunk=8)), (37, Tiles(16, 3, 4, chunk=4))]
KINDS = ["two streams", "document origin", "groups", "one stream", "window"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def planned(kind, tiles, segments, block_size):
    """(visibility, plan, classes of its forward steps, of its backward steps) of a batch of rows."""
    length = segments.shape[1]
    if kind == "window":
        visibility, num_keys = block_window(segments[:, 0] * 7, 8), 8 + length
    elif kind == "one stream":
        visibility, num_keys = block_causal(make_layout(segments, block_size)), length
    else:
        origin = "document" if kind == "document origin" else "global"
        layout = make_layout(segments, block_size, origin)
        if kind == "groups":
            layout = grouped(layout, Groups(jnp.int32([3, 2]), jnp.int32([2, 0])), segments % 3 > 0)
        visibility, num_keys = block_diffusion(layout), 2 * length
    plan = make_plan(visibility, num_keys, tiles)
    return visibility, plan, *(step_classes(plan, chunks) for chunks in (tiles.forward, tiles.backward))


def padded_mask(visibility, num_keys, tiles):
    """[rows, queries, keys] with queries padded to whole tiles (as the last one), each half of the keys to chunks."""
    mask = np.asarray(dense_mask(visibility, num_keys))
    noisy, clean = mask[..., : visibility.num_noisy], mask[..., visibility.num_noisy :]
    halves = [np.pad(half, ((0, 0), (0, 0), (0, -half.shape[2] % tiles.chunk))) for half in (noisy, clean)]
    return np.pad(np.concatenate(halves, 2), ((0, 0), (0, -mask.shape[1] % tiles.queries), (0, 0)), mode="edge")


def tile_steps(plan, chunks):
    """Chunks of each step of each query tile, read from the plan's columns."""
    for run in np.asarray(plan.runs).reshape(-1, COLUMNS)[:-1]:
        positions = np.arange(run[COUNT])
        offsets = np.where(positions < run[NOISY_COUNT], run[NOISY_OFFSET], run[CLEAN_OFFSET])
        yield run[ROW], np.split(positions + offsets, range(chunks, len(positions), chunks))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(SIZES), st.integers(1, 45), st.integers(0, 2), st.integers(0, 999))
def test_steps_cover_the_mask_and_classes_are_right(kind, size, block_size, padding, seed):
    length, tiles = size
    segments = np.sort(np.random.default_rng(seed).integers(1, 4, (2, length)), axis=1)
    segments[:, length - padding :] = 0
    visibility, plan, classes, backward_classes = planned(kind, tiles, jnp.asarray(segments), block_size)
    chunks, chunk, queries = tiles.forward, tiles.chunk, tiles.queries
    mask = padded_mask(visibility, plan.num_keys, tiles)
    blocks = mask.reshape(mask.shape[0], -1, queries, mask.shape[2] // chunk, chunk).transpose(0, 1, 3, 2, 4)
    assert blocks.shape[1:3] == (plan.tiles_per_row, plan.chunks_per_row)
    classes = np.asarray(classes)
    for number, (row, steps) in enumerate(tile_steps(plan, chunks)):
        tile = blocks[row, number % plan.tiles_per_row]
        assert row == number // plan.tiles_per_row
        read = np.concatenate(steps)
        assert len(set(read)) == len(read)
        unread = np.setdiff1d(np.arange(len(tile)), read)
        assert not tile[unread].any(), "a chunk that is read by nobody is seen by somebody"
        assert [c for c in classes[number] if c] == list(classes[number, : len(steps)])
        assert len(steps) == np.count_nonzero(classes[number])
        for step, class_ in zip(steps, classes[number], strict=False):
            full = len(step) == chunks and tile[step].all()
            noisy = set(step < plan.noisy_chunks)
            # Full of both kinds of keys at once counts as partial: that is the one permitted loss.
            assert (class_ == 2) == (full and len(noisy) == 1)
    assert int(plan.forward_steps[0]) == np.count_nonzero(classes)
    assert int(plan.backward_steps[0]) == np.count_nonzero(backward_classes)


def test_packed_documents_cost_what_they_need():
    """Aligned documents of a quarter of the row: no chunk of another document is read."""
    segments = jnp.repeat(jnp.arange(1, 5), 64)[None]
    tiles = Tiles(16, 1, 1, chunk=16)
    plan = make_plan(block_diffusion(make_layout(segments, 16)), 512, tiles)
    # Per document of four tiles: clean queries read 1 .. 4 chunks, noisy ones 0 .. 3 and their own.
    assert int(plan.forward_steps[0]) == 4 * 2 * (1 + 2 + 3 + 4)
    assert int((step_classes(plan, 1) == 1).sum()) == 0


def test_block_size_and_documents_are_data():
    compiled = jax.jit(
        lambda segments, b: (
            make_plan(block_diffusion(make_layout(segments, b)), 64, Tiles(8, 2, 2, chunk=8)).forward_steps
        )
    )
    steps = [int(compiled(jnp.full((1, 32), 1, jnp.int32), b)[0]) for b in (1, 8, 32)]
    assert compiled._cache_size() == 1 and len(set(steps)) > 1
