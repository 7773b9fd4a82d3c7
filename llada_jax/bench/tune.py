"""The cost of the attention kernel for each choice of tile sizes: estimated by the compiler, or timed on a device.

The work is that of the bench: 16 fixed rows of 4096 tokens per kind of documents, forward and backward; or a decoding
batch against caches of 8192. A candidate is compiled once per pass. The compiler's cycles are the kernel's alone, since
XLA's work around it does not depend on the tiles.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

from llada_jax.attention.kernel import kernel_attention
from llada_jax.attention.plan import make_plan
from llada_jax.attention.tiles import TileEntry, Tiles, cut
from llada_jax.attention.visibility import block_diffusion, block_window, make_layout
from llada_jax.bench.attention import (
    BLOCK_SIZE,
    HEADS,
    KV_HEADS,
    attention_kernels,
    counts_per_row,
    kernel_regions,
    total_cycles,
)
from llada_jax.bench.timing import least_seconds
from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.pod import attention_program, packings
from llada_jax.pod.aot import compile_program

PASSES = {"row": ("forward", "backward"), "decode": ("decode",)}
LENGTHS = {"row": 4096, "decode": 8192}
REPEATS = 5

# (pass, Tiles) -> cost.
Price = Callable[[str, Tiles], float]


def candidates(device_kind: str, head_dim: int, shape: str, all_rows, chunk_sizes, steps) -> Iterator[TileEntry]:
    """Every combination; decoding has no backward pass, and takes the same number of chunks for it."""
    for tile_rows, chunk, forward, backward in itertools.product(all_rows, chunk_sizes, steps, steps):
        if shape != "decode" or forward == backward:
            yield TileEntry(device_kind, head_dim, shape, tile_rows, forward, backward, chunk)


def ranking(entries: Iterable[TileEntry], price: Price, unit: str, report: Callable[[str], None]) -> list[TileEntry]:
    """The entries with their costs, cheapest first. A candidate that the compiler refuses is reported and left out.

    report: is told each price as it is found. Passes are priced once for all entries that differ only in the other.
    """
    costs: dict[tuple, float | None] = {}
    ranked = []
    for entry in entries:
        queries = BLOCK_SIZE if entry.shape == "decode" else 2 * LENGTHS["row"]
        tiles, cost = cut(entry, HEADS // KV_HEADS, queries), {"unit": unit}
        for name in PASSES[entry.shape]:
            chunks = tiles.backward if name == "backward" else tiles.forward
            key = name, tiles.queries, tiles.chunk, chunks
            if key not in costs:
                label = f"{name:8} rows {entry.rows:4} chunk {tiles.chunk:3} x {chunks}"
                try:
                    # What the other pass takes does not matter.
                    costs[key] = price(name, Tiles(tiles.queries, chunks, chunks, tiles.chunk))
                    report(f"{label}: {costs[key]:.4g} {unit}")
                except (InputError, ValueError) as error:  # the compiler's, or of a schedule that cannot be told apart
                    costs[key] = None
                    report(f"{label}: refused: {error}")
            cost[name] = costs[key]
        if None not in cost.values():
            ranked.append(dataclasses.replace(entry, cost=cost))
    return sorted(ranked, key=total)


def total(entry: TileEntry) -> float:
    return sum(entry.cost[name] for name in PASSES[entry.shape])


def estimated(topology: str, head_dim: int) -> Price:
    """A Price in cycles of a device's busiest core, by the compiler's schedules, summed over all kinds of documents."""
    chip = parse_topology(topology).chip

    def price(name: str, tiles: Tiles) -> float:
        length = LENGTHS["decode" if name == "decode" else "row"]
        arguments = {"implementation": "llada", "direction": name, "length": length, "head_dim": head_dim}
        arguments["tiles"] = dataclasses.asdict(tiles)
        (schedule,) = attention_kernels(compile_program("llada_jax.bench.attention:pass_program", arguments, topology))

        def cycles(mean: int) -> float:
            counts = counts_per_row(name, length, mean, head_dim, tiles)
            return total_cycles(kernel_regions(schedule, counts, attention_program.REGIONS[name], chip)[1])

        return sum(map(cycles, (0,) if name == "decode" else packings.MEANS))

    return price


def timed(head_dim: int, interpret: bool = False, lengths=LENGTHS, batch: int = packings.ROWS) -> Price:
    """A Price in seconds on the current device, minimum of REPEATS, summed over all kinds of documents.

    lengths, batch: smaller work, for tests.
    """

    def price(name: str, tiles: Tiles) -> float:
        length = lengths["decode" if name == "decode" else "row"]
        if name == "decode":
            masks = [block_window(jnp.asarray(packings.cached(length)[:batch]), BLOCK_SIZE)]
            queries, keys = BLOCK_SIZE, BLOCK_SIZE + length
        else:
            segments = [
                jnp.asarray(packings.segment_ids(LENGTHS["row"], mean)[:batch, :length]) for mean in packings.MEANS
            ]
            masks = [block_diffusion(make_layout(x, BLOCK_SIZE)) for x in segments]
            queries = keys = 2 * length
        shapes = (queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS)
        random = zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
        arrays = [jax.random.normal(key, (batch, *shape, head_dim), jnp.bfloat16) for key, shape in random]
        forward = jax.jit(lambda arrays, plan: kernel_attention(*arrays, plan, interpret))
        saving = jax.jit(lambda arrays, plan: jax.vjp(lambda *x: kernel_attention(*x, plan, interpret), *arrays))
        backward = jax.jit(lambda vjp, cotangent: vjp(cotangent))

        def seconds(mask) -> float:
            plan = make_plan(mask, keys, tiles)
            if name != "backward":
                return least_seconds(lambda: forward(arrays, plan), REPEATS, warm_up=True)
            out, vjp = saving(arrays, plan)
            return least_seconds(lambda: backward(vjp, out), REPEATS, warm_up=True)

        return sum(map(seconds, masks))

    return price
