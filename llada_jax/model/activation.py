"""The weighted SwiGLU between the two grouped matmuls of the experts, and the second of them.

    hidden[r] = silu(gate[r]) * up[r] * weight[r]            y[r] = hidden[r] @ down[group of row r]

The weight is applied before the last matmul, so the backward pass does not need that matmul's result. It does not keep
`hidden` either: it recomputes it, together with all gradients, from the same bytes.

"xla"       the plain formula, on any device.
"megablox"  Pallas kernels that stream the rows, for TPUs: each byte is read once and written once. XLA takes twice as
            long: it writes the gradients of gate and up separately and joins them in another copy.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llada_jax.model.grouped_matmul import gradient_of_groups, gradient_of_rows, grouped_matmul

LANES = 128
_ROWS = 1024  # most rows of a block
_BYTES = 3 * 2**18  # most bytes of gate in a block: double-buffered blocks of the backward pass take 9 of 16 MiB
_PIECE = 16  # rows of a bfloat16 register: with whole blocks the compiler keeps too many values alive


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def swiglu_matmul(
    gate_up: jax.Array, weights: jax.Array, down: jax.Array, group_sizes: jax.Array, kernel: str = "xla",
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """y as above. gate_up [rows, 2 * mlp], the gate first; weights [rows] float32; down [groups, mlp, embed].

    group_sizes, kernel, interpret, dtypes and rows of no group: as in grouped_matmul. Rows are independent, except in
    the gradient of `down`. The backward pass needs gate_up, which has the remat name "expert_hidden".
    """
    hidden = weighted_swiglu(gate_up, weights, kernel, interpret)
    return grouped_matmul(hidden, down, group_sizes, kernel, interpret)


def _forward(gate_up, weights, down, group_sizes, kernel, interpret):
    y = swiglu_matmul(gate_up, weights, down, group_sizes, kernel, interpret)
    # Named here as in grouped_matmul.
    return y, (checkpoint_name(gate_up, "expert_hidden"), weights, down, group_sizes)


def _backward(kernel, interpret, residuals, dy):
    gate_up, weights, down, group_sizes = residuals
    d_hidden = gradient_of_rows(dy, down, group_sizes, kernel, interpret)
    hidden, d_gate_up, d_weights = weighted_swiglu_gradients(gate_up, weights, d_hidden, kernel, interpret)
    return d_gate_up, d_weights, gradient_of_groups(hidden, dy, group_sizes, down, kernel, interpret), None


swiglu_matmul.defvjp(_forward, _backward)


def weighted_swiglu(gate_up: jax.Array, weights: jax.Array, kernel: str = "xla", interpret: bool = False) -> jax.Array:
    """hidden [rows, mlp], computed in float32, in gate_up's dtype.

    "megablox" takes any number of rows, and any mlp up to 3072 (of bfloat16); multiples of 128, a register's lanes, are
    fastest.
    """
    if kernel == "xla":
        return _weighted_swiglu(gate_up, weights)
    lines = _lines(weights, tile(*gate_up.shape, gate_up.dtype))
    hidden = jax.ShapeDtypeStruct((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    operands, results = (gate_up, lines), (hidden,)
    return _stream(_forward_kernel, "expert_activation_forward", operands, results, interpret)[0]


def weighted_swiglu_gradients(
    gate_up: jax.Array, weights: jax.Array, d_hidden: jax.Array, kernel: str = "xla", interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden again, and the gradients of gate_up and weights, each like what it is the gradient of."""
    if kernel == "xla":
        hidden, gradients = jax.vjp(_weighted_swiglu, gate_up, weights)
        return hidden, *gradients(d_hidden)
    lines = _lines(weights, tile(*gate_up.shape, gate_up.dtype))
    operands = gate_up, lines, d_hidden
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (d_hidden, gate_up, lines))
    in_place = {0: 1, 2: 0}  # gate_up and d_hidden are read here last
    hidden, d_gate_up, d_lines = _stream(
        _backward_kernel, "expert_activation_backward", operands, results, interpret, in_place
    )
    return hidden, d_gate_up, d_lines.reshape(-1)[: len(weights)]


def _weighted_swiglu(gate_up, weights):
    gate, up = (half.astype(jnp.float32) for half in jnp.split(gate_up, 2, axis=1))
    return (jax.nn.silu(gate) * up * weights[:, None]).astype(gate_up.dtype)


def _forward_kernel(gate_up, weights, hidden):
    column = _column(weights[0])
    for rows, gate, up in _pieces(gate_up):
        hidden[rows] = (jax.nn.silu(gate) * up * column[rows]).astype(hidden.dtype)


def _backward_kernel(gate_up, weights, d_hidden, hidden, d_gate_up, d_weights):
    mlp = hidden.shape[1]
    column, d_column = _column(weights[0]), []
    for rows, gate, up in _pieces(gate_up):
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        swiglu = silu * up
        hidden[rows] = (swiglu * column[rows]).astype(hidden.dtype)
        d = d_hidden[rows].astype(jnp.float32)
        d_column.append((d * swiglu).sum(axis=1, keepdims=True))
        d *= column[rows]
        d_gate_up[rows, :mlp] = (d * up * (sigmoid + silu * (1 - sigmoid))).astype(d_gate_up.dtype)
        d_gate_up[rows, mlp:] = (d * silu).astype(d_gate_up.dtype)
    d_weights[0] = _line(jnp.concatenate(d_column))


def _pieces(gate_up):
    """(rows, gate, up), the last two in float32, of a block piece by piece."""
    tile, mlp = gate_up.shape[0], gate_up.shape[1] // 2
    for start in range(0, tile, _PIECE):
        rows = slice(start, start + _PIECE)
        yield rows, gate_up[rows, :mlp].astype(jnp.float32), gate_up[rows, mlp:].astype(jnp.float32)


def tile(rows: int, columns: int, dtype) -> int:
    """Rows of a block, in whole lines."""
    row_bytes = columns // 2 * dtype.itemsize
    return LANES * max(1, min(_ROWS // LANES, _BYTES // row_bytes // LANES, math.ceil(rows / LANES)))


def _lines(weights: jax.Array, tile: int) -> jax.Array:
    """weights [rows] -> [tiles, tile / 128, 128]: as a column, they would take 128 times their bytes."""
    return jnp.pad(weights, (0, -len(weights) % tile)).reshape(-1, tile // LANES, LANES)


def _column(lines):
    """[n, 128] -> [n * 128, 1]"""
    return jnp.where(_diagonal(len(lines)), lines[:, None], 0).sum(axis=2, keepdims=True).reshape(-1, 1)


def _line(column):
    """[n * 128, 1] -> [n, 128]. Selected, not multiplied: a row's NaN stays its own."""
    column = column.reshape(-1, LANES, 1)
    return jnp.where(_diagonal(len(column)), column, 0).sum(axis=1)


def _diagonal(lines: int):
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (lines, LANES, LANES), axis) for axis in (1, 2))
    return row == lane


def _stream(kernel, name: str, operands, results, interpret: bool, in_place=None):
    """Runs `kernel` on every block of rows. operands: gate_up, lines of weights, and others of rows.

    in_place: {operand: result} of those that share memory; interpreted, they cannot where rows are no whole blocks. The
    last block may reach past the rows: what is read there is anything, and what is written there is lost.
    """
    tiles, lines, _ = operands[1].shape

    def spec(x):
        if x.shape == operands[1].shape:
            return pl.BlockSpec((1, lines, LANES), lambda i: (i, 0, 0))
        return pl.BlockSpec((lines * LANES, x.shape[1]), lambda i: (i, 0))

    return pl.pallas_call(
        kernel,
        name=name,
        grid=(tiles,),
        in_specs=[spec(x) for x in operands],
        out_specs=[spec(x) for x in results],
        out_shape=results,
        input_output_aliases={} if interpret else in_place or {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(*operands)
