"""Attention of decoding on TPUs: one Pallas kernel reads the cached keys of each row once, in place, up to its own end.

A unit is one key/value head of one row. Its own keys come first; then chunks of the cache stream through a ring of
buffers, filled ahead of the arithmetic and across the units, so that no unit waits for its first chunk. A chunk is
scored while the one before is folded in, so that matrix and vector units work at the same time. Scores are transposed,
[keys, queries], as in kernel_walk.py.
"""

import collections
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention.decoding.cached import CACHE_AXES, SCOPE
from llada_jax.attention.kernel_walk import HIDDEN, dot
from llada_jax.attention.visibility import Visibility
from llada_jax.errors import InputError

NAME = "cached_attention"
CHUNK = 512  # positions of the cache that are read at a time
ALIGNED = 16  # rows of a bfloat16 tile: where copies may start
AHEAD = 4  # chunks that are on their way
RING = AHEAD + 1
LANES = 128  # of a register, and of a row of a tile


@flax.struct.dataclass
class CachedPlan:
    """The mask of a pass, as the kernel reads it. Made once, outside the layers.

    bounds [batch, 4, group * queries] int32: noisy_start, noisy_end, clean_start, clean_end of the queries of a head,
    repeated for each head of a group. chunks [batch] int32: chunks of the cache that any query of the row sees; at
    least one, seen or not.
    """

    bounds: jax.Array
    chunks: jax.Array
    chunk: int = flax.struct.field(pytree_node=False)


def cache_sizes(positions: int, head_dim: int) -> tuple[int, int]:
    """(positions, lanes) of a head in a cache that the kernel reads in place: whole tiles."""
    sizes = zip((positions, head_dim), (ALIGNED, LANES), strict=True)
    return tuple(-(-size // whole) * whole for size, whole in sizes)


def make_plan(visibility: Visibility, length: int, group: int) -> CachedPlan:
    """visibility: as cached_attention's; length: positions of the cache; group: query heads of a key/value head, on a
    device. Raises InputError if the kernel cannot read a cache of this length.
    """
    if length % ALIGNED:
        raise InputError(
            f"attention='kernel': a cache of {length} positions, expected a multiple of {ALIGNED}; set "
            "execution.attention=dense, or a block length that is one"
        )
    chunk = min(CHUNK, length)
    start, end = visibility.clean_start, visibility.clean_end
    seen = jnp.max(jnp.where(start < end, end, 0), axis=1)
    bounds = jnp.stack([visibility.noisy_start, visibility.noisy_end, start, end], axis=1)
    return CachedPlan(jnp.tile(bounds, (1, 1, group)), jnp.maximum(-(-seen // chunk), 1), chunk)


@jax.named_scope(SCOPE)
def cached_kernel_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, cached_key: jax.Array, cached_value: jax.Array,
    layer: jax.Array | int, plan: CachedPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Equals cached_attention with the visibility that the plan was made from; operands are as there.

    The last axis of the cache may be longer than head_dim, and should be a multiple of LANES: XLA lays shorter ones
    out another way, and would copy the whole cache (findings/libtpu_copies_caches_of_short_heads.sh). What is
    beyond head_dim is zero. Under a mesh every device runs its own rows and heads. interpret=True runs on any
    device, slowly, for tests.
    """
    layer, copies = jnp.asarray(layer, jnp.int32), sharding.kv_copies(query.shape[2], key.shape[2])

    def local(query, key, value, cached_key, cached_value, layer, plan):
        padding = [(0, 0)] * 3 + [(0, cached_key.shape[4] - key.shape[3])]
        key, value = (jnp.pad(x.swapaxes(1, 2), padding) for x in (key, value))
        return attention_of_device(query, key, value, cached_key, cached_value, layer, plan, copies, interpret)

    if (mesh := sharding.mesh_in_force()) is None:
        return local(query, key, value, cached_key, cached_value, layer, plan)
    cache = sharding.spec(CACHE_AXES, cached_key.shape, mesh)
    rows, split = PartitionSpec(cache[1]), "tensor" if copies > 1 else cache[2]
    queries, own = PartitionSpec(cache[1], None, split), PartitionSpec(cache[1], None, cache[2])
    specs = (queries, own, own, cache, cache, PartitionSpec(), rows)
    run = jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)
    return run(query, key, value, cached_key, cached_value, layer, plan)


def attention_of_device(
    query: jax.Array, key: jax.Array, value: jax.Array, cached_key: jax.Array, cached_value: jax.Array,
    layer: jax.Array, plan: CachedPlan, copies: int = 1, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """cached_kernel_attention of a device's own rows and heads. key, value [batch, kv_heads, queries, lanes], as a
    layer of the cache. copies: sharding.kv_copies: above 1, the device has all key/value heads and uses one.
    """
    head = jnp.int32(0)
    if copies > 1:
        # Where a head's key/value head is shared by several ranks, each has the whole cache and reads that head of it.
        head = lax.axis_index("tensor") // copies
        key, value = (lax.dynamic_slice_in_dim(x, head, 1, axis=1) for x in (key, value))
    return _attention(query, key, value, cached_key, cached_value, layer, head, plan, interpret)


def _attention(query, key, value, cached_key, cached_value, layer, first_head, plan: CachedPlan, interpret):
    """first_head: of the cache, which the first of key's heads belongs to."""
    interpret = pltpu.InterpretParams() if interpret else False
    batch, queries, heads, head_dim = query.shape
    kv_heads, lanes = key.shape[1], cached_key.shape[4]
    group = heads // kv_heads
    rows, width, units = group * queries, group * head_dim, batch * kv_heads
    # The first axis of the grid may be split over the TensorCores of a device.
    parts = 2 if units % 2 == 0 else 1
    per_part = units // parts

    def of_unit(block, index):
        """The part of an operand that belongs to a unit; index(row, head)."""

        def place(part, i, *_):
            unit = part * per_part + i
            return index(unit // kv_heads, unit % kv_heads)

        return pl.BlockSpec(block, place)

    # The heads of a position lie side by side, as projections make and take them, where groups are whole registers.
    joined = kv_heads == 1 or width % LANES == 0
    if joined:
        query = query.reshape(batch, 1, queries, heads * head_dim)
        heads_of_group = of_unit((1, 1, queries, width), lambda row, head: (row, 0, 0, head))
    else:
        query = query.reshape(batch, queries, kv_heads, width).swapaxes(1, 2)
        heads_of_group = of_unit((1, 1, queries, width), lambda row, head: (row, head, 0, 0))
    own = of_unit((1, 1, queries, lanes), lambda row, head: (row, head, 0, 0))

    ring = pltpu.VMEM((RING, plan.chunk, lanes), cached_key.dtype)
    buffers = dict(
        key_ring=ring,
        value_ring=ring,
        rows=pltpu.VMEM((rows, lanes), query.dtype),
        scores=pltpu.VMEM((2, plan.chunk, rows), jnp.float32),
        highest=pltpu.VMEM((2, 1, rows), jnp.float32),
        maximum=pltpu.VMEM((1, rows), jnp.float32),
        denominator=pltpu.VMEM((1, rows), jnp.float32),
        accumulator=pltpu.VMEM((lanes, rows), jnp.float32),
        walk=pltpu.SMEM((3,), jnp.int32),
        key_done=pltpu.SemaphoreType.DMA((RING,)),
        value_done=pltpu.SemaphoreType.DMA((RING,)),
    )
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    in_specs = [heads_of_group, own, own, of_unit((1, 4, rows), lambda row, head: (row, 0, 0)), hbm, hbm]
    names = ("query", "key", "value", "bounds", "cached_key", "cached_value", "output", *buffers)
    references = collections.namedtuple("References", names)
    if not interpret:
        cached_key, cached_value = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (cached_key, cached_value)
        )
    output = pl.pallas_call(
        lambda *refs: _Unit(per_part, kv_heads, *refs[:2], references(*refs[2:])).run(),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(parts, per_part),
            in_specs=in_specs,
            out_specs=heads_of_group,
            scratch_shapes=list(buffers.values()),
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        interpret=interpret,
        name=NAME,
    )(
        jnp.stack([layer, first_head]), plan.chunks, query, key, value, plan.bounds, cached_key, cached_value,
    )  # fmt: skip
    return (output if joined else output.swapaxes(1, 2)).reshape(batch, queries, heads, head_dim)


class _Unit:
    """The kernel of one unit. where: the layer, and the cache's head of the first of key's heads. refs: operands,
    result, buffers and semaphores, by name. walk [3] int32, kept between units: unit and number of the chunk whose copy
    starts next, number of this chunk since the start.
    """

    def __init__(self, per_part: int, kv_heads: int, where, chunks, refs):
        self.refs, self.where, self.chunks = refs, where, chunks
        self.per_part, self.kv_heads, self.index = per_part, kv_heads, pl.program_id(1)
        self.first, self.end = pl.program_id(0) * per_part, (pl.program_id(0) + 1) * per_part
        self.row = (self.first + self.index) // kv_heads
        self.chunk, self.length = refs.key_ring.shape[1], refs.cached_key.shape[3]
        self.streams = (
            (refs.cached_key, refs.key_ring, refs.key_done), (refs.cached_value, refs.value_ring, refs.value_done),
        )  # fmt: skip
        self.queries = refs.key.shape[2]
        self.heads = refs.rows.shape[0] // self.queries

    def run(self):
        refs = self.refs
        pl.when(self.index == 0)(self.start)
        self.load_queries()
        own = self.inside(refs.bounds[0, 0:1], refs.bounds[0, 1:2], self.queries)
        last = self.chunks[self.row] - 1
        self.score(0, last % 2)
        own_scores = jnp.where(own, dot(refs.key[0, 0], refs.rows[...], 1, 1), HIDDEN)
        self.fold(own_scores, jnp.max(own_scores, axis=0, keepdims=True), refs.value[0, 0], first=True)

        def step(number, _):
            self.move_on()
            # Buffers by constants, or the compiler could not know that one is read and the other written.
            for buffer in (0, 1):
                pl.when((last - number) % 2 == buffer)(functools.partial(self.pass_chunk, number, buffer))

        lax.fori_loop(0, last, step, None)
        self.fold_chunk(0)
        self.move_on()
        self.store()
        pl.when(self.index == self.per_part - 1)(self.finish)

    def start(self):
        walk = self.refs.walk
        walk[0], walk[1], walk[2] = self.first, 0, 0
        for slot in range(AHEAD):
            self.start_next(slot)

    def finish(self):
        """Waits for the copies that nothing reads."""
        for ahead in range(AHEAD):
            self.wait((self.refs.walk[2] + ahead) % RING)

    def start_of(self, number):
        """The first position of a chunk; the last one may overlap the one before."""
        return pl.multiple_of(jnp.minimum(number * self.chunk, self.length - self.chunk), ALIGNED)

    def start_next(self, slot):
        """Starts the copies of the chunk at `walk` and moves on; past the end of the part, copies its last unit's."""
        walk = self.refs.walk
        unit, number = jnp.minimum(walk[0], self.end - 1), walk[1]
        row, head = unit // self.kv_heads, self.where[1] + unit % self.kv_heads
        place = self.where[0], row, head, pl.ds(self.start_of(number), self.chunk)
        for source, ring, done in self.streams:
            pltpu.make_async_copy(source.at[place], ring.at[slot], done.at[slot]).start()
        more = (number + 1 < self.chunks[row]) & (walk[0] < self.end)
        walk[0] = jnp.where(more, walk[0], jnp.minimum(walk[0] + 1, self.end))
        walk[1] = jnp.where(more, number + 1, 0)

    def wait(self, slot):
        for source, ring, done in self.streams:
            pltpu.make_async_copy(source.at[0, 0, 0, pl.ds(0, self.chunk)], ring.at[slot], done.at[slot]).wait()

    def load_queries(self):
        """rows [group * queries, lanes] <- the queries of the group's heads, times log2(e) / sqrt(head_dim)."""
        refs, head_dim = self.refs, self.refs.query.shape[3] // self.heads
        if head_dim < refs.rows.shape[1]:
            refs.rows[...] = jnp.zeros_like(refs.rows)
        for h in range(self.heads):
            query = refs.query[0, 0, :, h * head_dim : (h + 1) * head_dim].astype(jnp.float32)
            scaled = (query * (head_dim**-0.5 * math.log2(math.e))).astype(refs.rows.dtype)
            refs.rows[h * self.queries : (h + 1) * self.queries, :head_dim] = scaled

    def pass_chunk(self, number, buffer):
        """Folds in a chunk, whose scores are in `buffer`, and scores the next one into the other buffer."""
        self.score(number + 1, 1 - buffer)
        self.fold_chunk(buffer, 1)

    def move_on(self):
        """To the next chunk: its buffer of the ring is the one after, and that of the chunk before is free."""
        walk = self.refs.walk
        self.start_next((walk[2] + AHEAD) % RING)
        walk[2] = walk[2] + 1

    def score(self, number, buffer):
        """Scores of the chunk at `walk`, and their maximum."""
        refs = self.refs
        slot = refs.walk[2] % RING
        self.wait(slot)
        base = self.start_of(number)
        start = jnp.maximum(refs.bounds[0, 2:3], number * self.chunk) - base
        visible = self.inside(start, refs.bounds[0, 3:4] - base, self.chunk)
        scores = jnp.where(visible, dot(refs.key_ring[slot], refs.rows[...], 1, 1), HIDDEN)
        refs.scores[buffer] = scores
        refs.highest[buffer] = jnp.max(scores, axis=0, keepdims=True)

    def fold_chunk(self, buffer, ago=0):
        """Folds in the chunk that is `ago` chunks before that at `walk`."""
        refs = self.refs
        self.fold(refs.scores[buffer], refs.highest[buffer], refs.value_ring[(refs.walk[2] + RING - ago) % RING])

    @staticmethod
    def inside(start, end, count):
        """bool [count, queries]: positions within each query's interval."""
        position = lax.broadcasted_iota(jnp.int32, (count, start.shape[1]), 0)
        return (position >= start) & (position < end)

    def fold(self, scores, maximum, values, first=False):
        """Folds scores [count, rows], their maximum [1, rows] and values [count, lanes] into the running maximum,
        denominator and accumulator; the first ones start them.
        """
        refs = self.refs
        if not first:
            maximum = jnp.maximum(refs.maximum[...], maximum)
        weights = jnp.exp2(scores - maximum)
        denominator = jnp.sum(weights, axis=0, keepdims=True)
        accumulator = dot(values, weights.astype(values.dtype), 0, 0)
        if not first:
            decay = jnp.exp2(refs.maximum[...] - maximum)
            denominator += refs.denominator[...] * decay
            accumulator += refs.accumulator[...] * decay
        refs.maximum[...], refs.denominator[...], refs.accumulator[...] = maximum, denominator, accumulator

    def store(self):
        refs, head_dim = self.refs, self.refs.output.shape[3] // self.heads
        scale = jnp.where(refs.maximum[...] > HIDDEN / 2, 1 / refs.denominator[...], 0)
        output = (refs.accumulator[...] * scale).T.astype(refs.output.dtype)
        for h in range(self.heads):
            rows = slice(h * self.queries, (h + 1) * self.queries)
            refs.output[0, 0, :, h * head_dim : (h + 1) * head_dim] = output[rows, :head_dim]
