"""Programs of known cost, compiled ahead of time by the tests of llada_jax/pod."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 512  # rows and columns of a step of `stream`
SIDE = 16384  # too large for XLA to keep an operand in the vector memory


def _tiled(kernel, name, tile, inputs, grid, semantics="arbitrary"):
    """Calls `kernel` on tiles of [SIDE, SIDE] arrays; `grid` tiles in rows and columns."""
    spec = pl.BlockSpec((tile, tile), lambda i, j: (i, j))
    shape = jax.ShapeDtypeStruct((SIDE, SIDE), inputs[0].dtype)
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[spec] * len(inputs),
        out_specs=spec,
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics, "arbitrary")),
    )
    return call, tuple(inputs)


def several(programs):
    """[name of a function here, its arguments] each, as one program."""
    calls, inputs = zip(*(globals()[name](**arguments) for name, arguments in programs), strict=True)
    return lambda *operands: [call(*x) for call, x in zip(calls, operands, strict=True)], inputs


def matmul(tile: int, dtype: str, contract: int = 1):
    """Each grid step multiplies two [tile, tile] matrices, the first transposed where its dimension 0 is contracted:
    tile ** 3 multiply-accumulates.
    """

    def kernel(a, b, out):
        dimensions = (((contract,), (0,)), ((), ()))
        out[...] = jax.lax.dot_general(a[...], b[...], dimensions, preferred_element_type=jnp.float32).astype(out.dtype)

    x = jax.ShapeDtypeStruct((SIDE, SIDE), dtype)
    return _tiled(kernel, f"matmul_{dtype}_{contract}", tile, (x, x), (4, 4))


def increment(tile: int, semantics: str = "arbitrary"):
    """Each grid step loads and stores tile ** 2 / 1024 registers."""

    def kernel(x, out):
        out[...] = x[...] + 1.0

    x = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    return _tiled(kernel, f"increment_{semantics}", tile, (x,), (4, 4), semantics)


def conditional(tile: int):
    """Two `pl.when` regions: an increment of every tile in the first column, a matmul of the others."""

    def kernel(x, out):
        first = pl.program_id(1) == 0

        @pl.when(first)
        def _():
            out[...] = x[...] + 1.0

        @pl.when(jnp.logical_not(first))
        def _():
            out[...] = jnp.dot(x[...], x[...], preferred_element_type=jnp.float32).astype(out.dtype)

    return _tiled(kernel, "conditional", tile, (jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16),), (4, 4))


def too_large():
    """Half a gigabyte of scratch does not fit the vector memory."""
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def kernel(x, out, scratch):
        scratch[:8] = x[...]
        out[...] = scratch[:8]

    return pl.pallas_call(kernel, out_shape=x, scratch_shapes=[pltpu.VMEM((2**20, 128), jnp.float32)]), (x,)


def stream(terms: int, steps: int):
    """Each of the grid's steps reads and writes a [BLOCK, BLOCK] block, of a sum of so many terms."""

    def kernel(x, out):
        out[...] = functools.reduce(lambda total, term: total + jnp.exp(x[...] * term), range(2, terms), x[...] + 1.0)

    spec = pl.BlockSpec((BLOCK, BLOCK), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((BLOCK * steps, BLOCK), jnp.float32)
    parameters = pltpu.CompilerParams(dimension_semantics=("parallel",))
    call = pl.pallas_call(
        kernel, name=f"stream_{terms}_{steps}", grid=(steps,), in_specs=[spec], out_specs=spec, out_shape=shape,
        compiler_params=parameters,
    )  # fmt: skip
    return call, (shape,)
