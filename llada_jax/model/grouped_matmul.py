"""The grouped matmul: each group's rows times the matrix of that group, at the cost of the rows in use.

"xla"       a loop over tiles of rows, each within one group: any device, exact, slow on a TPU.
"megablox"  the Pallas kernels gmm and tgmm that JAX ships, for TPUs.

(`lax.ragged_dot` is dense in the number of groups on CPU, and in its weight gradient on TPU.)
"""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from llada_jax.attention.tiles import device_kind
from llada_jax.model import grouped_tiles

# The package exports its module's function under the module's name.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

KERNELS = ("xla", "megablox")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, kernel: str = "xla", interpret: bool = False
) -> jax.Array:
    """y[i] = x[i] @ w[group of row i], and in the backward pass dw[g] = sum over the rows of g of x^T dy.

    x [rows, in], rows sorted by group; w [groups, in, out]; group_sizes [groups] int32. kernel: a name in KERNELS.
    interpret: run "megablox" on any device, slowly, for tests. Returns [rows, out] in x's dtype, accumulated in
    float32. Rows past the sum of group_sizes are undefined, also in dx, and do not enter dw. The backward pass needs x,
    which has the remat name "expert_rows".
    """
    if kernel == "xla":
        return _rows_times_groups(x, w, group_sizes)
    return rows_times_groups(x, w, group_sizes, interpret)


def _forward(x, w, group_sizes, kernel, interpret):
    # Named here, where nothing else reads it: JAX would round a separate copy of a value that the forward pass reads.
    return grouped_matmul(x, w, group_sizes, kernel, interpret), (checkpoint_name(x, "expert_rows"), w, group_sizes)


def _backward(kernel, interpret, residuals, dy):
    x, w, group_sizes = residuals
    dx = gradient_of_rows(dy, w, group_sizes, kernel, interpret)
    return dx, gradient_of_groups(x, dy, group_sizes, w, kernel, interpret), None


grouped_matmul.defvjp(_forward, _backward)


def stack_matmul(
    x: jax.Array, stack: jax.Array, layer: jax.Array, group_sizes: jax.Array, kernel: str = "xla",
    interpret: bool = False, scale: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """grouped_matmul with the matrices of one layer of a stack [layers, groups, in, out], read in place. (lax.scan
    would copy them for a kernel.) No gradient.

    scale [layers, groups, 1, out] float32: of a stack in int8. "megablox" takes none: the layer is dequantised for it.
    """
    flat, first = stack.reshape(-1, *stack.shape[2:]), layer * stack.shape[1]
    if kernel == "xla":
        scales = None if scale is None else scale.reshape(-1, *scale.shape[2:])
        return _rows_times_groups(x, flat, group_sizes, first, scales)
    if scale is not None:
        return rows_times_groups(x, dequantized(stack[layer], scale[layer], x.dtype), group_sizes, interpret)
    return rows_times_groups(x, flat, group_sizes, interpret, first=first)


def dequantized(w: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """The matrices w int8 [..., in, out] with their scales float32 [..., 1, out], in this dtype."""
    return (w.astype(jnp.float32) * scale).astype(dtype)


def gradient_of_rows(dy: jax.Array, w: jax.Array, group_sizes: jax.Array, kernel: str, interpret: bool) -> jax.Array:
    """dx [rows, in] of grouped_matmul."""
    if kernel == "xla":
        return _rows_times_groups(dy, jnp.swapaxes(w, 1, 2), group_sizes)
    return rows_times_groups(dy, w, group_sizes, interpret, transpose_rhs=True)


def gradient_of_groups(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, w: jax.Array, kernel: str, interpret: bool
) -> jax.Array:
    """dw, like w, of grouped_matmul."""
    if kernel == "xla":
        return _group_gradients(x, dy, group_sizes, w)
    return group_gradients(x, dy, group_sizes, interpret).astype(w.dtype)


def rows_times_groups(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    interpret: bool = False,
    transpose_rhs: bool = False,
    first: jax.Array | None = None,
) -> jax.Array:
    """x [rows, in] times its group's w[g], or w[g]^T, by the Pallas kernel; otherwise as grouped_matmul.

    first: the matrix of group 0, in a w of more matrices than groups.
    """
    columns = w.shape[1 if transpose_rhs else 2]
    tiles = _interpreted(x, columns) if interpret else grouped_tiles.rows_times_groups(*x.shape, columns, device_kind())
    y = megablox.gmm(
        _whole_tiles(x, tiles[0]), w, group_sizes.astype(jnp.int32), preferred_element_type=x.dtype, tiling=tiles,
        group_offset=None if first is None else -first,  # gmm's offset counts from the group of w's first matrix
        transpose_rhs=transpose_rhs, interpret=pltpu.InterpretParams() if interpret else False,
    )  # fmt: skip
    return y[: x.shape[0]]


def group_gradients(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """sum over the rows of each group of x^T dy, [groups, in, out] in x's dtype, by the Pallas kernel."""
    columns = dy.shape[1]
    tiles = _interpreted(x, columns) if interpret else grouped_tiles.group_gradients(*x.shape, columns, device_kind())
    x, dy = _whole_tiles(x, tiles[0]), _whole_tiles(dy, tiles[0])
    return megablox.tgmm(
        x.swapaxes(0, 1), dy, group_sizes.astype(jnp.int32), preferred_element_type=x.dtype, tiling=tiles,
        interpret=pltpu.InterpretParams() if interpret else False,
    )  # fmt: skip


def _interpreted(x, columns) -> tuple[int, int, int]:
    return min(16, x.shape[0]), x.shape[1], columns


def _whole_tiles(x: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0))) if x.shape[0] % tile else x


def _tiles(rows: int, group_sizes: jax.Array):
    """Cuts each group into tiles of at most `tile` rows: (tile, used, group, start, stop), the last three [max tiles].

    Tile t holds rows start[t] .. stop[t] of group[t]; `used` (a run-time value) of them exist.
    """
    groups = group_sizes.shape[0]
    tile = max(8, min(128, 1 << max(rows // groups, 1).bit_length()))
    tiles_of_group = (group_sizes + tile - 1) // tile
    most = rows // tile + min(groups, rows)
    first_tile = jnp.cumsum(tiles_of_group) - tiles_of_group
    first_row = jnp.cumsum(group_sizes) - group_sizes
    group = jnp.repeat(jnp.arange(groups), tiles_of_group, total_repeat_length=most)
    start = first_row[group] + (jnp.arange(most) - first_tile[group]) * tile
    stop = jnp.minimum(start + tile, first_row[group] + group_sizes[group])
    return tile, tiles_of_group.sum(), group, start, stop


def _pad_rows(x: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x, ((0, tile), (0, 0)))  # the last tile may reach past the last row


@functools.partial(jax.jit, inline=True)
def _rows_times_groups(x, w, group_sizes, first=0, scale=None):
    rows = x.shape[0]
    tile, used, group, start, _ = _tiles(rows, group_sizes)
    padded = _pad_rows(x, tile)

    def one_tile(t, y):
        part = jax.lax.dynamic_slice_in_dim(padded, start[t], tile)
        matrix = w[first + group[t]] if scale is None else w[first + group[t]].astype(x.dtype)
        product = jnp.dot(part, matrix, preferred_element_type=jnp.float32)
        if scale is not None:
            product *= scale[first + group[t]]
        # Rows past the group's end are wrong here; the next tile, or the cut below, overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), start[t], 0)

    y = jax.lax.fori_loop(0, used, one_tile, jnp.zeros((rows + tile, w.shape[2]), x.dtype))
    return y[:rows]


@functools.partial(jax.jit, inline=True)
def _group_gradients(x, dy, group_sizes, w):
    """dw[g] = sum over the rows of g of x^T dy, accumulated in float32."""
    tile, used, group, start, stop = _tiles(x.shape[0], group_sizes)
    x, dy = _pad_rows(x, tile), _pad_rows(dy, tile)

    def one_tile(t, dw):
        inside = (start[t] + jnp.arange(tile) < stop[t])[:, None]
        part = jnp.where(inside, jax.lax.dynamic_slice_in_dim(x, start[t], tile), 0)
        grad = jax.lax.dynamic_slice_in_dim(dy, start[t], tile)
        return dw.at[group[t]].add(jnp.dot(part.T, grad, preferred_element_type=jnp.float32))

    return jax.lax.fori_loop(0, used, one_tile, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype)
