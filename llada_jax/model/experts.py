"""The experts of a layer: tokens sorted by expert, a grouped matmul, and the weighted sum back.

The grouped matmul here is plain XLA: a loop over tiles of rows, each of one expert. It is exact and dropless, and its
cost is that of the tiles in use, whatever the number of experts (`lax.ragged_dot` is dense in it on CPU, and in its
weight gradient on TPU).
"""

import functools

import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig
from llada_jax.model.layers import swiglu
from llada_jax.model.router import route


def moe(x: jax.Array, weights: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
    """Routed experts plus the shared one: y = sum_k w_k E_k(x) + S(x). x and the result [tokens, embed]."""
    experts, expert_weights = route(x, weights["router"], weights.get("expert_bias"), config)
    y = combine_experts(x, experts, expert_weights, weights["gate"], weights["up"], weights["down"])
    if config.num_shared_experts:
        y = y + swiglu(x, weights, "shared_")
    return y


def combine_experts(x, experts, expert_weights, gate, up, down) -> jax.Array:
    """sum_k w_k down_k(silu(gate_k x) * up_k x), summed in float32.

    x [tokens, embed]; experts, expert_weights [tokens, k]; gate, up [experts, embed, mlp]; down [experts, mlp, embed].
    """
    tokens, k = experts.shape
    order = jnp.argsort(experts.reshape(-1), stable=True)
    group_sizes = jnp.bincount(experts.reshape(-1), length=gate.shape[0])
    sorted_x = x[order // k]
    hidden = jax.nn.silu(grouped_matmul(sorted_x, gate, group_sizes)) * grouped_matmul(sorted_x, up, group_sizes)
    sorted_y = grouped_matmul(hidden, down, group_sizes)
    y = sorted_y[jnp.argsort(order)].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", y.astype(jnp.float32), expert_weights).astype(x.dtype)


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each run of rows by the matrix of its group: y[i] = x[i] @ w[group of row i].

    x [rows, in], rows sorted by group; w [groups, in, out]; group_sizes [groups] int, summing to rows.
    Returns [rows, out] in x's dtype.
    """
    return _rows_times_groups(x, w, group_sizes)


def _forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = _rows_times_groups(dy, jnp.swapaxes(w, 1, 2), group_sizes)
    return dx, _group_gradients(x, dy, group_sizes, w), None


grouped_matmul.defvjp(_forward, _backward)


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
def _rows_times_groups(x, w, group_sizes):
    rows = x.shape[0]
    tile, used, group, start, _ = _tiles(rows, group_sizes)
    padded = _pad_rows(x, tile)

    def one_tile(t, y):
        part = jax.lax.dynamic_slice_in_dim(padded, start[t], tile)
        product = jnp.dot(part, w[group[t]], preferred_element_type=jnp.float32).astype(y.dtype)
        # Rows past the group's end are wrong here; the next tile, or the cut below, overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(y, product, start[t], 0)

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
