"""The experts of a layer for few tokens, as one TPU kernel: decoding.

Tokens and sums stay in fast memory; the weights of the experts that any token reaches stream through it once. A token
of `embed` numbers lies there as whole registers of its own (two bfloat16 in a word), so that taking a row, or adding to
one, is a few vector moves and no shuffle across sublanes:

    words [tokens * W, 128]       the tokens, W registers' sublanes each
    sums [tokens * C, 128]        float32, C = embed / 128
    for each expert e of this core, its rows in tiles:
        tile [T, embed] <- words of the rows' tokens
        y <- down_e(silu(gate_e tile) * up_e tile)
        sums of the rows' tokens += weight * y

The cores of a device share out the experts; their sums are added outside. No gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_walk import dot, scratch_bytes

NAME = "fused_experts"
LANES = 128
SUBLANES = 8
GROUP = 16  # rows that are taken together: of a tile of bfloat16
MOST_GROUPS = 16  # of a tile
MOST_PARTS = 8
STAGE = 128  # tokens that are brought in, and out, together, at most
AHEAD = 2  # experts whose weights are on their way
FOR_SPILLS = 6 << 20  # bytes of fast memory for the compiler


def fused_parts(
    tokens: int, embed: int, width: int, pairs: int, experts: int, dtype, interpret: bool = False
) -> int | None:
    """Into how many parts the tokens must be cut so that one fits the fast memory of this chip; the weights stream
    through it once per part. None if no cut of MOST_PARTS or fewer fits, the lists of pairs do not fit scalar memory,
    or tokens are no whole registers.

    width: of an expert, on this device. pairs: of a token and one of `experts` experts, on all ranks. interpret: no
    memory has an end.
    """
    words = embed * jnp.dtype(dtype).itemsize // 4
    if words % (SUBLANES * LANES) or width % LANES:
        return None
    info = None if interpret else pltpu.get_tpu_info()
    if info and 4 * (2 * pairs + 2 * MOST_PARTS * (experts + 1)) > info.smem_capacity_bytes * 3 // 4:
        return None
    for parts in range(1, MOST_PARTS + 1):
        if tokens % (parts * GROUP) == 0:
            buffers = _scratch(tokens // parts, embed, width, tile_rows(pairs / parts / experts), dtype)
            if not info or scratch_bytes(buffers.values()) + FOR_SPILLS <= info.vmem_capacity_bytes:
                return parts
    return None


def tile_rows(pairs_per_expert: float) -> int:
    """Rows of a tile: nearly all experts should need one, as weights enter the matrix units once per tile."""
    likely = pairs_per_expert + 2.5 * math.sqrt(pairs_per_expert)
    return GROUP * min(max(math.ceil(likely / GROUP), 1), MOST_GROUPS)


def fused_experts(
    x: jax.Array,
    experts: jax.Array,
    expert_weights: jax.Array,
    weights: dict[str, jax.Array],
    parts: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_k w_k down_k(silu(gate_k x) * up_k x) [tokens, embed], like x, and the rows of each expert, int32.

    x [tokens, embed]; experts [k, tokens] int32, of which those outside 0 .. experts - 1 are left out; expert_weights
    [k, tokens] float32. weights: "gate", "up" [layers, experts, embed, width], "down" [layers, experts, width, embed],
    of which those of weights["layer"], an int32 scalar, are read in place; "router" [embed, experts on all ranks].
    parts: of fused_parts.
    """
    num_experts, width = weights["gate"].shape[1], weights["gate"].shape[3]
    tokens, embed = x.shape[0] // parts, x.shape[1]
    of_parts = zip(*(jnp.split(array, parts, axis=1) for array in (experts, expert_weights)), strict=True)
    lists = zip(*(work_list(*part, num_experts) for part in of_parts), strict=True)
    work = [jnp.concatenate(each) for each in lists]
    load = jnp.diff(work[2].reshape(parts, -1)).sum(0)
    tile = tile_rows(experts.size / parts / weights["router"].shape[1])
    cores = 2 if interpret else pltpu.get_tpu_info().num_cores
    scratch = _scratch(tokens, embed, width, tile, x.dtype)
    buffers = list(scratch.values())
    limit = None if interpret else scratch_bytes(buffers) + FOR_SPILLS
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    arrays = [x, *(weights[name] for name in ("gate", "up", "down"))]
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
    semaphores = [pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((AHEAD + 1,))]
    sums = pl.pallas_call(
        functools.partial(_kernel, tuple(scratch), tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, parts),
            in_specs=[hbm] * 4,
            out_specs=hbm,
            scratch_shapes=[*buffers, *semaphores],
        ),
        out_shape=jax.ShapeDtypeStruct((cores, *x.shape), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit, disable_bounds_checks=True
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=NAME,
    )(jnp.reshape(weights["layer"], 1), *work, *arrays)
    return sums.astype(jnp.float32).sum(0).astype(x.dtype), load


def work_list(experts: jax.Array, expert_weights: jax.Array, num_experts: int):
    """(token [rows], weight [rows], starts [experts + 1], order [experts + 1]) of the pairs sorted by expert.

    Rows starts[e] .. starts[e + 1] - 1 are expert e's. order: the number of experts with rows, then those, then the
    others.
    """
    k, tokens = experts.shape
    here = (experts >= 0) & (experts < num_experts)
    keys = jnp.where(here, experts, num_experts).T.reshape(-1)
    _, token, weight = lax.sort(
        (keys, jnp.arange(keys.size, dtype=jnp.int32) // k, expert_weights.astype(jnp.float32).T.reshape(-1)),
        num_keys=1,
    )
    starts = (keys[:, None] < jnp.arange(num_experts + 1)[None]).sum(0, dtype=jnp.int32)
    empty = starts[1:] == starts[:-1]
    number = jnp.arange(num_experts, dtype=jnp.int32)
    listed = lax.sort(jnp.where(empty, num_experts, 0) + number) % num_experts
    return token, weight, starts, jnp.concatenate([(~empty).sum(dtype=jnp.int32)[None], listed])


def _scratch(tokens: int, embed: int, width: int, tile: int, dtype) -> dict[str, pltpu.VMEM]:
    """Buffers in fast memory."""
    packed = jnp.dtype(dtype).itemsize == 2
    word, sublanes, columns = (jnp.uint32, embed // 2 // LANES, embed // LANES) if packed else (
        jnp.float32, embed // LANES, embed // LANES,
    )  # fmt: skip
    return dict(
        stage=pltpu.VMEM((2, GROUP * math.gcd(STAGE // GROUP, tokens // GROUP), embed), dtype),
        words=pltpu.VMEM((tokens * sublanes, LANES), word),
        sums=pltpu.VMEM((tokens * columns, LANES), jnp.float32),
        tile_words=pltpu.VMEM((tile * sublanes, LANES), word),
        tile=pltpu.VMEM((tile, embed), dtype),
        results=pltpu.VMEM((tile * columns, LANES), jnp.float32),
        gate_ring=pltpu.VMEM((AHEAD + 1, embed, width), dtype),
        up_ring=pltpu.VMEM((AHEAD + 1, embed, width), dtype),
        down_ring=pltpu.VMEM((AHEAD + 1, width, embed), dtype),
    )


def _pack(left: jax.Array, right: jax.Array) -> jax.Array:
    """Two bfloat16 arrays, given as float32, in the halves of uint32 words."""
    left, right = (lax.bitcast_convert_type(half, jnp.uint32) for half in (left, right))
    return (left & jnp.uint32(0xFFFF0000)) | (right >> 16)


def _unpack(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of _pack."""
    halves = words & jnp.uint32(0xFFFF0000), words << 16
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in halves)


class _Offset:
    """A list in scalar memory, from `offset` on."""

    def __init__(self, values, offset):
        self.values, self.offset = values, offset

    def __getitem__(self, i):
        return self.values[self.offset + i]


def _kernel(names, tile_size, layer, tokens, weights, starts, order, x, gate, up, down, output, *buffers):
    """tokens, weights, starts, order: of work_list, one after the other for each part of the tokens. x, gate, up, down,
    output: in HBM. buffers: those of `names`, then semaphores.
    """
    refs = dict(zip(names, buffers, strict=False))
    stage_done, ring_done = buffers[len(names) :]
    stage, words, sums, tile = (refs[name] for name in ("stage", "words", "sums", "tile"))
    (core, part), (cores, parts) = map(pl.program_id, (0, 1)), map(pl.num_programs, (0, 1))
    num_tokens, num_experts = x.shape[0] // parts, gate.shape[1]
    first_token, first_row = part * num_tokens, part * (tokens.shape[0] // parts)
    starts, order = (_Offset(list_, part * (num_experts + 1)) for list_ in (starts, order))
    packed = words.dtype == jnp.uint32
    columns, sublanes = x.shape[1] // LANES, words.shape[0] // num_tokens
    rows_of_stage = stage.shape[1]
    stages = num_tokens // rows_of_stage
    mine = (order[0] - core + cores - 1) // cores  # experts of this core

    def stage_in(i):
        source = x.at[pl.ds(first_token + i * rows_of_stage, rows_of_stage)]
        return pltpu.make_async_copy(source, stage.at[i % 2], stage_done.at[i % 2])

    def stage_out(i):
        target = output.at[core, pl.ds(first_token + i * rows_of_stage, rows_of_stage)]
        return pltpu.make_async_copy(stage.at[i % 2], target, stage_done.at[i % 2])

    def expert_copies(i):
        expert, slot = order[1 + core + i * cores], i % (AHEAD + 1)
        return [
            pltpu.make_async_copy(source.at[layer[0], expert], refs[ring].at[slot], ring_done.at[slot])
            for source, ring in ((gate, "gate_ring"), (up, "up_ring"), (down, "down_ring"))
        ]

    def start_expert(i):
        @pl.when(i < mine)
        def _():
            for copy in expert_copies(i):
                copy.start()

    def lanes(column):
        return slice(column * LANES, (column + 1) * LANES)

    def clear(group, _):
        rows = GROUP * columns
        sums[pl.ds(pl.multiple_of(group * rows, SUBLANES), rows), :] = jnp.zeros((rows, LANES), jnp.float32)

    def spread(i, _):
        """Brings tokens in."""
        pl.when(i + 1 < stages)(lambda: stage_in(i + 1).start())
        stage_in(i).wait()

        def of_group(group, _):
            rows = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
            first = (i * rows_of_stage + group * GROUP) * sublanes
            for column in range(sublanes):
                part = stage[i % 2, rows, lanes(column)].astype(jnp.float32)
                if packed:
                    part = _pack(part, stage[i % 2, rows, lanes(sublanes + column)].astype(jnp.float32))
                words[pl.ds(first + column, GROUP, stride=sublanes), :] = part

        lax.fori_loop(0, rows_of_stage // GROUP, of_group, None)

    def take(first, end, groups):
        """tile <- the tokens of rows first, ..., in `groups` groups; rows from `end` on are any."""

        def of_group(group, _):
            for r in range(GROUP):
                row = group * GROUP + r
                token = tokens[jnp.minimum(first + row, end - 1)]
                place = pl.ds(pl.multiple_of(token * sublanes, SUBLANES), sublanes)
                target = pl.ds(pl.multiple_of(row * sublanes, SUBLANES), sublanes)
                refs["tile_words"][target, :] = words[place, :]
            rows = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
            for column in range(sublanes):
                part = refs["tile_words"][pl.ds(group * GROUP * sublanes + column, GROUP, stride=sublanes), :]
                parts = _unpack(part) if packed else (part,)
                for half, value in enumerate(parts):
                    tile[rows, lanes(half * sublanes + column)] = value.astype(tile.dtype)

        lax.fori_loop(0, groups, of_group, None)

    def give(first, end, groups):
        """sums of the rows' tokens += weight * result."""

        def of_group(group, _):
            for r in range(GROUP):
                row = group * GROUP + r
                place = jnp.minimum(first + row, end - 1)
                weight = jnp.where(first + row < end, weights[place], 0.0)
                at = pl.ds(pl.multiple_of(tokens[place] * columns, SUBLANES), columns)
                result = refs["results"][pl.ds(pl.multiple_of(row * columns, SUBLANES), columns), :]
                sums[at, :] = sums[at, :] + weight * result

        lax.fori_loop(0, groups, of_group, None)

    def of_expert(i, _):
        slot, expert = i % (AHEAD + 1), order[1 + core + i * cores]
        start_expert(i + AHEAD)
        for copy in expert_copies(i):
            copy.wait()
        begin, end = (first_row + starts[expert + side] for side in (0, 1))

        def of_tile(number, _):
            first = begin + number * tile_size
            groups = (jnp.minimum(end - first, tile_size) + GROUP - 1) // GROUP
            take(first, end, groups)
            gated = dot(tile[...], refs["gate_ring"][slot], 1, 0)
            hidden = gated * lax.logistic(gated) * dot(tile[...], refs["up_ring"][slot], 1, 0)
            y = dot(hidden.astype(tile.dtype), refs["down_ring"][slot], 1, 0)
            for group in range(tile_size // SUBLANES):
                for column in range(columns):
                    at = pl.ds(group * SUBLANES * columns + column, SUBLANES, stride=columns)
                    refs["results"][at, :] = y[group * SUBLANES : (group + 1) * SUBLANES, lanes(column)]
            give(first, end, groups)

        lax.fori_loop(0, (end - begin + tile_size - 1) // tile_size, of_tile, None)

    def collect(i, _):
        """Sends sums out."""
        pl.when(i >= 2)(lambda: stage_out(i - 2).wait())

        def of_group(group, _):
            rows = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
            first = (i * rows_of_stage + group * GROUP) * columns
            for column in range(columns):
                part = sums[pl.ds(first + column, GROUP, stride=columns), :]
                stage[i % 2, rows, lanes(column)] = part.astype(stage.dtype)

        lax.fori_loop(0, rows_of_stage // GROUP, of_group, None)
        stage_out(i).start()

    stage_in(0).start()
    for i in range(AHEAD):
        start_expert(i)
    lax.fori_loop(0, num_tokens // GROUP, clear, None)
    tile[...] = jnp.zeros_like(tile)  # rows that no token fills yet must be finite
    lax.fori_loop(0, stages, spread, None)
    lax.fori_loop(0, mine, of_expert, None)
    lax.fori_loop(0, stages, collect, None)
    for i in range(max(stages - 2, 0), stages):
        stage_out(i).wait()
