"""Pallas kernels of a counting sort: the row of each pair (token, one of its experts), sorted by expert.

A pair's row is the number of rows of earlier experts, plus that of earlier tokens of the same expert. The first kernel
counts the tokens of each expert. The second goes through the tokens again and computes the row of each pair by a matrix
product with a triangle of ones. Tokens are in lanes, experts in sublanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 512  # tokens per step
PARTS = 2  # runs of tokens, independent except for their first row: as many as a device has TensorCores
SUBLANES, LANES = 8, 128  # of a register of 32 bits


def rows_by_expert(experts: jax.Array, num_experts: int, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns row [k, tokens] int32, the row of each pair sorted by (expert, token), and group_sizes [num_experts]
    int32.

    experts [k, tokens] int32, different for each token's k. Experts outside 0 .. num_experts - 1 are in no group; their
    rows are in 0 .. pairs - 1 but have no meaning. Takes any sizes, padded to whole tiles of tokens and registers of
    experts. Exact up to 2^24 pairs.
    """
    k, tokens = experts.shape
    tile = min(TILE, pl.cdiv(tokens, PARTS * LANES) * LANES)
    padded = jnp.pad(experts, ((0, 0), (0, -tokens % (PARTS * tile))), constant_values=-1)
    steps = padded.shape[1] // (PARTS * tile)
    whole = pl.cdiv(num_experts, SUBLANES) * SUBLANES
    pairs = pl.BlockSpec((k, tile), lambda part, step: (0, part * steps + step))

    def call(kernel, name, **arguments):
        return pl.pallas_call(
            kernel,
            name=name,
            grid=(PARTS, steps),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=pltpu.InterpretParams() if interpret else False,
            **arguments,
        )

    counts = call(
        _count_kernel,
        "router_rows_count",
        in_specs=[pairs],
        out_specs=pl.BlockSpec((1, SUBLANES, whole), lambda part, step: (part, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((PARTS, SUBLANES, whole), jnp.float32),
    )(padded)[:, 0]
    group_sizes = counts.sum(axis=0)
    first = (jnp.cumsum(group_sizes) - group_sizes)[None] + jnp.cumsum(counts, axis=0) - counts
    row = call(
        _row_kernel,
        "router_rows_place",
        in_specs=[pairs, pl.BlockSpec((1, whole, LANES), lambda part, step: (part, 0, 0))],
        out_specs=pairs,
        out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.int32),
        scratch_shapes=[pltpu.VMEM((whole, LANES), jnp.float32)],
    )(padded, jnp.broadcast_to(first[..., None], (*first.shape, LANES)))
    return row[:, :tokens], group_sizes[:num_experts].astype(jnp.int32)


def _count_kernel(experts_ref, counts_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
        counts_ref[...] = jnp.zeros_like(counts_ref)

    num_experts = counts_ref.shape[2]
    ones = jnp.ones((SUBLANES, experts_ref.shape[1]), jnp.bfloat16)
    contract_tokens = (((1,), (1,)), ((), ()))
    counts_ref[0] += jax.lax.dot_general(
        ones, _chosen(experts_ref[...], num_experts), contract_tokens, preferred_element_type=jnp.float32
    )


def _row_kernel(experts_ref, first_ref, row_ref, next_ref):
    """next_ref [experts, lanes], in all lanes alike: the row of each expert's next token."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        next_ref[...] = first_ref[0]

    # Of each lane how many are before it, and of all how many they are.
    lane, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), axis) for axis in (0, 1))
    earlier = ((lane < column) | (column >= LANES)).astype(jnp.bfloat16)
    next_row = next_ref[...]
    for start in range(0, experts_ref.shape[1], LANES):
        experts = experts_ref[:, pl.ds(start, LANES)]
        counts = jnp.dot(_chosen(experts, len(next_row)), earlier, preferred_element_type=jnp.float32)
        rows = registers(next_row + counts[:, :LANES])
        row_ref[:, pl.ds(start, LANES)] = jnp.concatenate(
            [jnp.where(here, rows, 0).sum(axis=0).sum(axis=0, keepdims=True) for here in _places(experts, rows.shape)]
        ).astype(jnp.int32)
        next_row += counts[:, LANES:]
    next_ref[...] = next_row


def _chosen(experts: jax.Array, num_experts: int) -> jax.Array:
    """[num_experts, lanes] bfloat16: 1 where a token has chosen the expert, else 0."""
    shape = num_experts // SUBLANES, SUBLANES, experts.shape[1]
    chosen = functools.reduce(lambda x, here: jnp.where(here, 1.0, x), _places(experts, shape), jnp.zeros(shape))
    return chosen.reshape(num_experts, -1).astype(jnp.bfloat16)


def _places(experts: jax.Array, shape: tuple[int, int, int]) -> list[jax.Array]:
    """Returns for each of a token's k experts its one-hot position: bool [registers, sublanes, lanes]."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape[1:], 0)
    first_expert = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * SUBLANES
    return [(experts[j : j + 1] - sublane)[None] == first_expert for j in range(len(experts))]


def registers(x: jax.Array) -> jax.Array:
    """[experts, lanes] -> [registers, sublanes, lanes]"""
    return x.reshape(-1, SUBLANES, x.shape[1])
