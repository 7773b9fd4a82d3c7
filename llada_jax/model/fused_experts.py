"""The experts of a layer for few tokens, as one TPU kernel: decoding.

Tokens and sums stay in fast memory; the weights of the experts that any token reaches stream through it once. A token
of `embed` numbers lies there as whole registers of its own (two bfloat16 in a word), so that taking a row, or adding to
one, is a few vector moves and no shuffle across sublanes:

    words [tokens * W, 128]       the tokens, W registers' sublanes each
    sums [tokens * C, 128]        float32, C = embed / 128
    for each expert e of this core, piece by piece, and its rows in tiles:
        tile [T, embed] <- words of the rows' tokens
        y <- down_e(silu(gate_e tile) * up_e tile), of a piece of the expert's width
        sums of the rows' tokens += weight * y

The cores of a device share out the experts; their sums are added outside. No gradient.
"""

import collections
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.kernel_walk import dot, scratch_bytes
from llada_jax.model.declarations import EXPERTS, SCALE, SCALES

NAME = "fused_experts"
LANES = 128
SUBLANES = 8
GROUP = 16  # rows that are taken together: of a tile of bfloat16
MOST_GROUPS = 6
MOST_CUTS = 8  # parts, and pieces
MOST_CALLS = 8
STAGE = 64  # tokens that are brought in, and out, together, at most
AHEAD = 2  # pieces of experts that are on their way, if there is room
FOR_SPILLS = 2 << 20  # bytes of fast memory for the compiler


class Cut(NamedTuple):
    """Into how many parts the tokens are cut, and into how many pieces the width of an expert, so that a part and a few
    pieces fit fast memory; how many pieces are on their way. The weights stream through it once per part; rows are
    taken, and added up, once per piece.
    """

    parts: int = 1
    pieces: int = 1
    ahead: int = AHEAD


def fused_cut(
    tokens: int, embed: int, width: int, pairs: int, experts: int, dtype, interpret: bool = False, stored=None
) -> Cut | None:
    """The cheapest cut that fits this chip: a part more costs about as much as two pieces more, a piece less on its way
    little. None if none fits, if the lists of pairs do not fit scalar memory, or if tokens or widths are no whole
    registers.

    width: of an expert, on this device. pairs: of a token and one of `experts` experts, on all ranks. dtype: of tokens.
    interpret: no memory has an end. stored: dtype of the weights, None: that of tokens.
    """
    words = embed * jnp.dtype(dtype).itemsize // 4
    if words % (SUBLANES * LANES) or width % LANES:
        return None
    info = None if interpret else pltpu.get_tpu_info()
    if info and 4 * (2 * pairs + 2 * MOST_CUTS * (experts + 1)) > info.smem_capacity_bytes * 3 // 4:
        return None
    cuts = itertools.product(range(1, MOST_CUTS + 1), range(1, MOST_CUTS + 1), (AHEAD, 1))
    for cut in sorted(itertools.starmap(Cut, cuts), key=lambda cut: (2 * cut.parts + cut.pieces, -cut.ahead)):
        if tokens % (cut.parts * GROUP) == 0 and width % (cut.pieces * LANES) == 0:
            buffers = _scratch(
                cut, tokens, embed, width, tile_rows(pairs / cut.parts / experts), dtype, stored or dtype
            )
            if not info or scratch_bytes(buffers.values()) + FOR_SPILLS <= info.vmem_capacity_bytes:
                return cut
    return None


def fused_calls(
    tokens: int, embed: int, width: int, pairs: int, experts: int, dtype, interpret: bool = False, stored=None
) -> tuple[int, Cut] | None:
    """(calls, cut of each): the fewest calls among which the tokens can be shared evenly so that each has a fused_cut.
    More tokens than scalar memory lists go through the kernel in several calls. None if MOST_CALLS are not enough.
    Arguments are fused_cut's.
    """
    calls = 1
    while calls <= MOST_CALLS and tokens % calls == 0:
        if cut := fused_cut(tokens // calls, embed, width, pairs // calls, experts, dtype, interpret, stored):
            return calls, cut
        calls *= 2
    return None


def tile_rows(pairs_per_expert: float) -> int:
    """Rows of a tile: nearly all experts should need one, or as few of at most MOST_GROUPS as can be."""
    likely = max(pairs_per_expert + 2.5 * math.sqrt(pairs_per_expert), 1)
    tiles = math.ceil(likely / (GROUP * MOST_GROUPS))
    return GROUP * math.ceil(likely / tiles / GROUP)


def fused_in_calls(
    calls: int, x: jax.Array, experts: jax.Array, expert_weights: jax.Array, weights: dict[str, jax.Array],
    cut: Cut = Cut(), interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """fused_experts of the tokens in `calls` equal parts, one after the other; cut: of a part."""
    parts = zip(
        jnp.split(x, calls), *(jnp.split(each, calls, axis=1) for each in (experts, expert_weights)), strict=True
    )
    sums, loads = zip(*(fused_experts(*part, weights, cut, interpret) for part in parts), strict=True)
    return (sums[0], loads[0]) if calls == 1 else (jnp.concatenate(sums), sum(loads))


def fused_experts(
    x: jax.Array,
    experts: jax.Array,
    expert_weights: jax.Array,
    weights: dict[str, jax.Array],
    cut: Cut = Cut(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_k w_k down_k(silu(gate_k x) * up_k x) [tokens, embed], like x, and the rows of each expert, int32.

    x [tokens, embed]; experts [k, tokens] int32, of which those outside 0 .. experts - 1 are left out; expert_weights
    [k, tokens] float32. weights: "gate", "up" [layers, experts, embed, width], "down" [layers, experts, width, embed],
    of which those of weights["layer"], an int32 scalar, are read in place; "router" [embed, experts on all ranks]. Of
    int8, with their scales "gate_scale", "up_scale", "down_scale" [layers, experts, 1, out] float32. cut: of fused_cut.
    """
    num_experts, width, parts = weights["gate"].shape[1], weights["gate"].shape[3], cut.parts
    of_parts = zip(*(jnp.split(array, parts, axis=1) for array in (experts, expert_weights)), strict=True)
    lists = zip(*(work_list(*part, num_experts) for part in of_parts), strict=True)
    work = [jnp.concatenate(each) for each in lists]
    load = jnp.diff(work[2].reshape(parts, -1)).sum(0)
    tile = tile_rows(experts.size / parts / weights["router"].shape[1])
    cores = 2 if interpret else pltpu.get_tpu_info().num_cores
    buffers = _scratch(cut, *x.shape, width, tile, x.dtype, weights["gate"].dtype)
    limit = None if interpret else scratch_bytes(buffers.values()) + FOR_SPILLS
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    operands = dict(x=x) | {name: weights[name] for name in (*EXPERTS, *SCALES) if name in weights}
    arrays = list(operands.values())
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
    semaphores = dict(stage_done=2, ring_done=cut.ahead + 1)
    references = collections.namedtuple("References", [*operands, "output", *buffers, *semaphores])
    sums = pl.pallas_call(
        lambda layer, *rest: _Part(layer, rest[:4], references(*rest[4:])).run(),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, parts),
            in_specs=[hbm] * len(arrays),
            out_specs=hbm,
            scratch_shapes=[*buffers.values(), *(pltpu.SemaphoreType.DMA((n,)) for n in semaphores.values())],
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
    k = experts.shape[0]
    here = (experts >= 0) & (experts < num_experts)
    keys = jnp.where(here, experts, num_experts).T.reshape(-1)
    # Expert and pair in one word: fewer operands to sort, and none to keep the order of equals.
    bits = (keys.size - 1).bit_length()
    packed = (keys.astype(jnp.uint32) << bits) | jnp.arange(keys.size, dtype=jnp.uint32)
    packed, weight = lax.sort((packed, expert_weights.astype(jnp.float32).T.reshape(-1)), num_keys=1, is_stable=False)
    token = (packed & ((1 << bits) - 1)).astype(jnp.int32) // k
    starts = (keys[:, None] < jnp.arange(num_experts + 1)[None]).sum(0, dtype=jnp.int32)
    empty = starts[1:] == starts[:-1]
    number = jnp.arange(num_experts, dtype=jnp.int32)
    listed = lax.sort(jnp.where(empty, num_experts, 0) + number, is_stable=False) % num_experts
    return token, weight, starts, jnp.concatenate([(~empty).sum(dtype=jnp.int32)[None], listed])


def _scratch(cut: Cut, tokens: int, embed: int, width: int, tile: int, dtype, stored) -> dict[str, pltpu.VMEM]:
    """Buffers in fast memory. tokens, width: before they are cut. dtype, stored: of tokens and of weights."""
    tokens, width, columns, ring = tokens // cut.parts, width // cut.pieces, embed // LANES, cut.ahead + 1
    word, sublanes = (jnp.uint32, columns // 2) if jnp.dtype(dtype).itemsize == 2 else (jnp.float32, columns)
    buffers = dict(
        stage=pltpu.VMEM((2, GROUP * math.gcd(STAGE // GROUP, tokens // GROUP), embed), dtype),
        words=pltpu.VMEM((tokens * sublanes, LANES), word),
        sums=pltpu.VMEM((tokens * columns, LANES), jnp.float32),
        tile_words=pltpu.VMEM((tile * sublanes, LANES), word),
        tile=pltpu.VMEM((tile, embed), dtype),
        results=pltpu.VMEM((tile * columns, LANES), jnp.float32),
        gate_ring=pltpu.VMEM((ring, embed, width), stored),
        up_ring=pltpu.VMEM((ring, embed, width), stored),
        down_ring=pltpu.VMEM((ring, width, embed), stored),
    )
    if jnp.dtype(stored) == jnp.int8:
        outs = zip(SCALES, (width, width, embed), strict=True)
        buffers |= {f"{name}_ring": pltpu.VMEM((ring, 1, out), jnp.float32) for name, out in outs}
    return buffers


def _pack(left: jax.Array, right: jax.Array) -> jax.Array:
    """Two bfloat16 arrays, given as float32, in the halves of uint32 words."""
    left, right = (lax.bitcast_convert_type(half, jnp.uint32) for half in (left, right))
    return (left & jnp.uint32(0xFFFF0000)) | (right >> 16)


def _unpack(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of _pack."""
    halves = words & jnp.uint32(0xFFFF0000), words << 16
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in halves)


class _Part:
    """A part of the tokens on one core. Weights come in pieces of an expert: piece i is the core's expert i // pieces.
    lists: of work_list, in scalar memory, one after the other for each part; refs:
    operands and result in HBM, buffers and semaphores, by name.
    """

    def __init__(self, layer, lists, refs):
        self.layer, self.refs = layer[0], refs
        self.tokens, self.weights, self.starts, self.order = lists
        self.core, self.cores, part, parts = *_grid(0), *_grid(1)
        num_tokens = refs.x.shape[0] // parts
        self.first_token, self.first_row = part * num_tokens, part * (self.tokens.shape[0] // parts)
        self.first_expert = part * (refs.gate.shape[1] + 1)
        self.packed = refs.words.dtype == jnp.uint32
        # Sublanes of a token, as words and as sums.
        self.sublanes, self.columns = refs.words.shape[0] // num_tokens, refs.x.shape[1] // LANES
        self.groups_of_stage = refs.stage.shape[1] // GROUP
        self.stages = num_tokens // refs.stage.shape[1]
        self.width, self.ahead = refs.gate_ring.shape[2], refs.gate_ring.shape[0] - 1
        self.pieces = refs.gate.shape[3] // self.width
        self.scaled = refs.gate.dtype == jnp.int8

    def run(self):
        refs, listed = self.refs, self.order[self.first_expert]
        mine = (listed - self.core + self.cores - 1) // self.cores * self.pieces
        self.stage_in(0).start()
        for i in range(self.ahead):
            pl.when(i < mine)(functools.partial(self.start_piece, i))
        lax.fori_loop(0, self.stages * self.groups_of_stage, self.clear, None)
        refs.tile[...] = jnp.zeros_like(refs.tile)  # rows that no token fills yet must be finite
        lax.fori_loop(0, self.stages, self.bring_in, None)
        lax.fori_loop(0, mine, functools.partial(self.compute_piece, mine), None)
        lax.fori_loop(0, self.stages, self.send_out, None)
        for i in range(max(self.stages - 2, 0), self.stages):
            self.stage_out(i).wait()

    def stage_rows(self, i):
        rows = self.refs.stage.shape[1]
        return pl.ds(self.first_token + i * rows, rows)

    def stage_in(self, i):
        refs = self.refs
        return pltpu.make_async_copy(refs.x.at[self.stage_rows(i)], refs.stage.at[i % 2], refs.stage_done.at[i % 2])

    def stage_out(self, i):
        refs = self.refs
        target = refs.output.at[self.core, self.stage_rows(i)]
        return pltpu.make_async_copy(refs.stage.at[i % 2], target, refs.stage_done.at[i % 2])

    def clear(self, group, _):
        rows = GROUP * self.columns
        at = pl.ds(pl.multiple_of(group * rows, SUBLANES), rows)
        self.refs.sums[at, :] = jnp.zeros((rows, LANES), jnp.float32)

    def bring_in(self, i, _):
        """words <- the tokens of stage i."""
        refs, sublanes = self.refs, self.sublanes
        pl.when(i + 1 < self.stages)(lambda: self.stage_in(i + 1).start())
        self.stage_in(i).wait()

        def of_group(group, _):
            rows = _group(group)
            first = (i * self.groups_of_stage + group) * GROUP * sublanes
            for column in range(sublanes):
                part = refs.stage[i % 2, rows, _lanes(column)].astype(jnp.float32)
                if self.packed:
                    part = _pack(part, refs.stage[i % 2, rows, _lanes(sublanes + column)].astype(jnp.float32))
                refs.words[pl.ds(first + column, GROUP, stride=sublanes), :] = part

        lax.fori_loop(0, self.groups_of_stage, of_group, None)

    def send_out(self, i, _):
        """The tokens of stage i <- sums."""
        refs, columns = self.refs, self.columns
        pl.when(i >= 2)(lambda: self.stage_out(i - 2).wait())

        def of_group(group, _):
            first = (i * self.groups_of_stage + group) * GROUP * columns
            for column in range(columns):
                part = refs.sums[pl.ds(first + column, GROUP, stride=columns), :]
                refs.stage[i % 2, _group(group), _lanes(column)] = part.astype(refs.stage.dtype)

        lax.fori_loop(0, self.groups_of_stage, of_group, None)
        self.stage_out(i).start()

    def expert(self, i):
        """Of piece i."""
        return self.order[self.first_expert + 1 + self.core + i // self.pieces * self.cores]

    def piece_copies(self, i):
        refs, slot = self.refs, i % (self.ahead + 1)
        at, columns = (self.layer, self.expert(i)), slice(None)
        if self.pieces > 1:
            columns = pl.ds(pl.multiple_of(i % self.pieces * self.width, LANES), self.width)
        into, out = (*at, slice(None), columns), (*at, columns)
        streams = [(refs.gate, into, refs.gate_ring), (refs.up, into, refs.up_ring), (refs.down, out, refs.down_ring)]
        if self.scaled:
            streams += (refs.gate_scale, into, refs.gate_scale_ring), (refs.up_scale, into, refs.up_scale_ring)
            streams += ((refs.down_scale, at, refs.down_scale_ring),)
        return [
            pltpu.make_async_copy(source.at[place], ring.at[slot], refs.ring_done.at[slot])
            for source, place, ring in streams
        ]

    def start_piece(self, i):
        for copy in self.piece_copies(i):
            copy.start()

    def compute_piece(self, mine, i, _):
        tile_size, slot = self.refs.tile.shape[0], i % (self.ahead + 1)
        pl.when(i + self.ahead < mine)(lambda: self.start_piece(i + self.ahead))
        for copy in self.piece_copies(i):
            copy.wait()
        begin, end = (self.first_row + self.starts[self.first_expert + self.expert(i) + side] for side in (0, 1))

        def of_tile(number, _):
            first = begin + number * tile_size
            groups = (jnp.minimum(end - first, tile_size) + GROUP - 1) // GROUP
            lax.fori_loop(0, groups, functools.partial(self.take, first, end), None)
            self.multiply(slot)
            lax.fori_loop(0, groups, functools.partial(self.give, first, end), None)

        lax.fori_loop(0, (end - begin + tile_size - 1) // tile_size, of_tile, None)

    def take(self, first, end, group, _):
        """A group of the tile <- the tokens of its rows, which start at `first`; rows from `end` on are any."""
        refs, sublanes = self.refs, self.sublanes
        for row in range(GROUP):
            place = jnp.minimum(first + group * GROUP + row, end - 1)
            target = _registers(group * GROUP + row, sublanes)
            refs.tile_words[target, :] = refs.words[_registers(self.tokens[place], sublanes), :]
        for column in range(sublanes):
            words = refs.tile_words[pl.ds(group * GROUP * sublanes + column, GROUP, stride=sublanes), :]
            for half, value in enumerate(_unpack(words) if self.packed else (words,)):
                refs.tile[_group(group), _lanes(half * sublanes + column)] = value.astype(refs.tile.dtype)

    def multiply(self, slot):
        """results <- down(silu(gate tile) * up tile)."""
        refs, columns = self.refs, self.columns
        tile = refs.tile[...]
        gated = self.times(tile, "gate", slot)
        hidden = gated * lax.logistic(gated) * self.times(tile, "up", slot)
        y = self.times(hidden.astype(tile.dtype), "down", slot)
        for first in range(0, len(tile), SUBLANES):
            for column in range(columns):
                at = pl.ds(first * columns + column, SUBLANES, stride=columns)
                refs.results[at, :] = y[first : first + SUBLANES, _lanes(column)]

    def times(self, x, name, slot):
        """x times the piece of a weight in a slot of its ring, float32."""
        ring = getattr(self.refs, f"{name}_ring")
        if not self.scaled:
            return dot(x, ring[slot], 1, 0)
        return dot(x, ring[slot].astype(x.dtype), 1, 0) * getattr(self.refs, f"{name}{SCALE}_ring")[slot]

    def give(self, first, end, group, _):
        """sums of the tokens of a group += weight * result."""
        refs, columns = self.refs, self.columns
        for row in range(GROUP):
            inside = first + group * GROUP + row < end
            place = jnp.minimum(first + group * GROUP + row, end - 1)
            weight = jnp.where(inside, self.weights[place], 0.0)
            at = _registers(self.tokens[place], columns)
            refs.sums[at, :] = refs.sums[at, :] + weight * refs.results[_registers(group * GROUP + row, columns), :]


def _grid(axis: int):
    return pl.program_id(axis), pl.num_programs(axis)


def _group(group):
    return pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)


def _registers(row, sublanes: int):
    """The registers of a row."""
    return pl.ds(pl.multiple_of(row * sublanes, SUBLANES), sublanes)


def _lanes(column: int) -> slice:
    return slice(column * LANES, (column + 1) * LANES)
