"""The experts of a layer: tokens sorted by expert, a grouped matmul, and the weighted sum back.

Dropless: every token goes to all of its experts, whatever their load. Over a mesh each shard of the batch routes and
sorts its own tokens; how experts and tokens meet is `Execution.expert_parallel`:

"gather_weights"  every shard gathers the weights of all experts (FSDP; the expert axis is one more axis of it).
"gather_tokens"   the ranks of the expert axis gather each other's tokens, each computes its own experts' part of the
                  sums, and the parts are reduced and scattered back. Buffers are those of the worst case, in which
                  every token goes to one rank; the work is that of the tokens that do. If the batch is whole on all of
                  these ranks, nothing is gathered, and the parts are summed.

The tensor axis splits every expert, and the shared one, along its hidden width. Passes of decoding, which read the
weights in place, run fused_experts.py instead of the sorted matmuls where their tokens fit fast memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llada_jax import sharding
from llada_jax.errors import InputError
from llada_jax.model.activation import swiglu_matmul, weighted_swiglu
from llada_jax.model.config import ModelConfig
from llada_jax.model.declarations import EXPERTS, SCALE, SCALES
from llada_jax.model.fused_experts import fused_calls, fused_in_calls
from llada_jax.model.grouped_matmul import dequantized, grouped_matmul, stack_matmul
from llada_jax.model.layers import swiglu
from llada_jax.model.router import route
from llada_jax.model.rows_kernel import rows_by_expert

EXPERT_PARALLEL = ("gather_weights", "gather_tokens")


def moe(
    inputs: tuple[jax.Array, ...], weights: dict[str, jax.Array], shards: sharding.WeightShards, config: ModelConfig,
    execution,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Routed experts plus the shared one, added to the residual: y = residual + (sum_k w_k E_k(x) + S(x)).

    inputs: x and residual [batch, length, embed], rows of this shard, and optionally bool [batch, length]: tokens that
    count towards the load (None or missing: all). weights: this shard's parts, with SCALES if EXPERTS are int8; with
    "layer", an int32 scalar, these are stacks of all layers (stacks_in_place). execution: forward.Execution. Returns y,
    like x, and the load: how many of the counted tokens each expert got, int32 [1, experts]. Raises InputError if the
    tensor axis does not divide the experts' width, or routing blocks do not divide the length.
    """
    x, residual, counted = (*inputs, None)[:3]
    if config.routing_block and x.shape[1] % config.routing_block:
        raise InputError(f"a pass over {x.shape[1]} positions: routing_block={config.routing_block} must divide them")
    tensor = shards.size("tensor")
    if config.moe_intermediate_size % tensor:
        raise InputError(f"mesh.tensor={tensor} does not divide moe_intermediate_size={config.moe_intermediate_size}")
    rows = x.reshape(-1, x.shape[-1])
    router = shards.gather(weights["router"], "router")
    routed = route(rows, router, weights.get("expert_bias"), config, execution.experts, execution.interpret)
    y, load = _routed(rows, *routed, weights, shards, execution)
    if counted is not None:  # of this rank's own tokens, whichever are gathered
        experts = jnp.where(counted.reshape(1, -1), routed[0], load.size)
        load = count_by_group(experts.reshape(-1), load.size)
    if config.num_shared_experts:
        shared = {
            name: shards.gather(w.astype(x.dtype), name, keep=("tensor",))
            for name, w in weights.items()
            if name.startswith("shared_")
        }
        y = y + swiglu(rows, shared, "shared_")
    if tensor > 1:
        y = sharding.sum_over(y, "tensor")
    # In the shape of the other sums, with which XLA then makes it: y would be written and read once more.
    y = residual.reshape(y.shape) + y
    return y.reshape(x.shape), load[None]


def _routed(x, experts, expert_weights, weights, shards, execution):
    """Returns sum_k w_k E_k(x) [tokens, embed] (with a tensor axis, this rank's part of the sum) and the load, int32
    [experts]: that of this rank's tokens or, if tokens are gathered, that of all ranks' tokens on this rank's experts.
    """
    gather_tokens = execution.expert_parallel == "gather_tokens" and shards.size("expert") > 1
    how, in_place = (execution.experts, execution.interpret), "layer" in weights
    num_experts = weights["router"].shape[1]
    if in_place:
        experts_here = weights["gate"].shape[1]
        combine = functools.partial(combine_in_stacks, weights=weights)
    else:
        keep = ("expert", "tensor") if gather_tokens else ("tensor",)
        gate, up, down = (_in_dtype(weights, name, x.dtype) for name in EXPERTS)
        # Side by side they are one matmul of twice the columns. Joined before they are gathered, this moves nothing.
        gate_up = shards.gather(jnp.concatenate([gate, up], axis=2), "gate", keep)
        experts_here = gate_up.shape[0]
        combine = functools.partial(combine_experts, gate_up=gate_up, down=shards.gather(down, "down", keep))

    def fused(tokens):
        """fused_calls for so many tokens; None: the sorted matmuls run."""
        if not in_place or execution.experts != "megablox":
            return None
        sizes = tokens, *weights["gate"].shape[2:], tokens * len(experts), num_experts
        return fused_calls(*sizes, x.dtype, how[1], weights["gate"].dtype)

    def sums(fitting, x, experts, expert_weights):
        """Of the experts on this rank, and the rows that each got. fitting: of `fused`."""
        if fitting is None:
            move = sort_by_expert(experts, experts_here, gather_tokens, *how)
            return combine(x, move, expert_weights, kernel=how[0], interpret=how[1]), move.group_sizes
        calls, cut = fitting
        return fused_in_calls(calls, x, experts, expert_weights, weights, cut, how[1])

    if not gather_tokens:
        return sums(fused(len(x)), x, experts, expert_weights)
    first = jax.lax.axis_index("expert") * experts_here

    def load_of(sizes):
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros(num_experts, jnp.int32), sizes, first, 0)

    if "expert" not in shards.token_axes:
        y, sizes = sums(fused(len(x)), x, experts - first, expert_weights)
        return sharding.sum_over(y, "expert"), jax.lax.psum(load_of(sizes), "expert")
    fitting, groups = fused(len(x) * shards.size("expert")), 1
    if fitting is not None:
        # The kernel streams the weights once for each call and part anyway. With tokens exchanged group by group, one
        # group is on its way while another is computed.
        groups, fitting = fitting[0] * fitting[1].parts, (1, fitting[1]._replace(parts=1))

    def exchanged(*of_tokens):
        x, experts, expert_weights = (
            jax.lax.all_gather(part, "expert", axis=axis, tiled=True)
            for part, axis in zip(of_tokens, (0, 1, 1), strict=True)
        )
        y, sizes = sums(fitting, x, experts - first, expert_weights)
        return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True), sizes

    y, sizes = zip(*map(exchanged, *_split(groups, x, experts, expert_weights)), strict=True)
    return y[0] if groups == 1 else jnp.concatenate(y), load_of(sum(sizes))


def _split(groups, x, experts, expert_weights):
    """Each in `groups` equal parts of its tokens."""
    return jnp.split(x, groups), jnp.split(experts, groups, axis=1), jnp.split(expert_weights, groups, axis=1)


def _in_dtype(weights, name, dtype):
    scale = weights.get(name + SCALE)
    return weights[name].astype(dtype) if scale is None else dequantized(weights[name], scale, dtype)


def stacks_in_place(weights: dict[str, jax.Array], axes: dict[str, tuple], execution, dtype) -> dict[str, jax.Array]:
    """The stacks of all layers' experts that a pass without gradients reads in place: EXPERTS, and SCALES if they are
    int8; none if something must be cast or gathered. axes: logical axes of the stacks.
    """
    stacks = {name: weights[name] for name in (*EXPERTS, *SCALES) if name in weights}
    if SCALES[0] not in stacks and any(w.dtype != dtype for w in stacks.values()):
        return {}
    if (mesh := sharding.mesh_in_force()) is None:
        return stacks
    allowed_axes = {"tensor", "expert"} if execution.expert_parallel == "gather_tokens" else {"tensor"}
    whole = all(allowed_axes.issuperset(sharding.split_over(axes[name], w.shape, mesh)) for name, w in stacks.items())
    return stacks if whole else {}


def combine_experts(
    x: jax.Array,
    move: "Move",
    expert_weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    kernel: str = "xla",
    interpret: bool = False,
) -> jax.Array:
    """Returns sum_k w_k down_k(silu(gate_k x) * up_k x) over this rank's experts, summed in float32.

    x [tokens, embed]; move: of sort_by_expert; expert_weights [k, tokens]; gate_up [experts, embed, 2 * mlp], the gate
    first; down [experts, mlp, embed]. kernel, interpret: as in grouped_matmul.
    """
    gate_up_x = grouped_matmul(rows_of_tokens(x, move), gate_up, move.group_sizes, kernel, interpret)
    weights = rows_of_pairs(expert_weights, move)
    return sums_of_pairs(swiglu_matmul(gate_up_x, weights, down, move.group_sizes, kernel, interpret), move)


def combine_in_stacks(
    x: jax.Array,
    move: "Move",
    expert_weights: jax.Array,
    weights: dict[str, jax.Array],
    kernel: str = "xla",
    interpret: bool = False,
) -> jax.Array:
    """combine_experts with layer weights["layer"] of the stacks "gate", "up" and "down" [layers, experts, in, out],
    which are read in place; with SCALES [layers, experts, 1, out] if they are int8. No gradient.
    """

    def times(rows, name):
        stack, scale = weights[name], weights.get(name + SCALE)
        return stack_matmul(rows, stack, weights["layer"], move.group_sizes, kernel, interpret, scale)

    rows = rows_of_tokens(x, move)
    gate_up_x = jnp.concatenate([times(rows, "gate"), times(rows, "up")], axis=1)
    hidden = weighted_swiglu(gate_up_x, rows_of_pairs(expert_weights, move), kernel, interpret)
    return sums_of_pairs(times(hidden, "down"), move)


class Move(NamedTuple):
    """How rows are sorted by expert: each pair (token, one of its k experts) has a row in the sorted order.

    pair [rows]: the pair of each row, as j * tokens + token. row [k, tokens]: the row of each pair. here [k, tokens]
    bool: the pair's expert is on this rank; None: all are. Rows of other pairs come last, may be missing, and have no
    meaning. group_sizes [experts] int32: rows per expert.
    """

    pair: jax.Array
    row: jax.Array
    here: jax.Array | None
    group_sizes: jax.Array

    def where_here(self, x: jax.Array) -> jax.Array:
        """x [k, tokens, ...], with zeros for pairs whose expert is on another rank."""
        return x if self.here is None else jnp.where(jnp.expand_dims(self.here, range(2, x.ndim)), x, 0)


def sort_by_expert(
    experts: jax.Array, num_experts: int, some_elsewhere: bool = False, kernel: str = "xla", interpret: bool = False
) -> Move:
    """Sorts pairs (token, expert) by expert and then by token. experts [k, tokens] int32, different for each token's k.

    some_elsewhere: some experts are outside 0 .. num_experts - 1 (on other ranks). kernel, interpret: as in
    grouped_matmul. The result has the remat name "routing".
    """
    k, tokens = experts.shape
    here = (experts >= 0) & (experts < num_experts) if some_elsewhere else None
    keys = jnp.where(here, experts, num_experts) if some_elsewhere else experts
    pair = _sorted_pairs(keys, num_experts + 1)
    if kernel == "megablox":
        row, group_sizes = rows_by_expert(experts, num_experts, interpret)
    else:
        row = jnp.argsort(pair).reshape(k, tokens)
        group_sizes = count_by_group(keys.reshape(-1), num_experts)
    if some_elsewhere:
        rows = tokens * min(k, num_experts)  # at most so many pairs are here
        pair, row = pair[:rows], jnp.minimum(row, rows - 1)
    move = Move(pair, row, here, group_sizes)
    return jax.tree.map(lambda part: checkpoint_name(part, "routing"), move)


def _sorted_pairs(keys: jax.Array, groups: int) -> jax.Array:
    """Returns the pairs j * tokens + token, sorted by keys [k, tokens] in 0 .. groups - 1, and then by token."""
    k, tokens = keys.shape
    j, token = (jax.lax.broadcasted_iota(jnp.uint32, keys.shape, axis) for axis in (0, 1))
    bits = (keys.size - 1).bit_length()
    if groups << bits <= 1 << 32:  # one array to sort instead of two
        packed = (keys.astype(jnp.uint32) << bits) | (token * k + j)
        place = jax.lax.sort(packed.reshape(-1), is_stable=False) & ((1 << bits) - 1)
    else:
        place = jnp.argsort(keys.T.reshape(-1), stable=True).astype(jnp.uint32)
    return (place % k * tokens + place // k).astype(jnp.int32)


def count_by_group(keys: jax.Array, groups: int) -> jax.Array:
    """Returns int32 [groups]: how often each of 0 .. groups - 1 occurs in keys [n]. (bincount would scatter.)"""
    return (keys[:, None] == jnp.arange(groups, dtype=keys.dtype)[None]).sum(axis=0, dtype=jnp.int32)


# The gradient of a gather by a permutation is a gather by its inverse; JAX would scatter and add.


@jax.custom_vjp
def rows_of_tokens(x: jax.Array, move: Move) -> jax.Array:
    """x [tokens, embed] -> [rows, embed]: each token at the rows of its pairs."""
    return _take(x, move.pair % move.row.shape[1])


@jax.custom_vjp
def sums_of_pairs(y: jax.Array, move: Move) -> jax.Array:
    """y [rows, embed] -> [tokens, embed]: sums over each token's pairs on this rank, in float32."""
    pairs = move.where_here(_take(y, move.row))
    # Pair by pair: of a sum over the axis XLA would first write all of it in float32.
    return functools.reduce(jnp.add, (pair.astype(jnp.float32) for pair in pairs)).astype(y.dtype)


@jax.custom_vjp
def rows_of_pairs(weights: jax.Array, move: Move) -> jax.Array:
    """weights [k, tokens] -> [rows]"""
    return _take(weights.reshape(-1), move.pair)


rows_of_tokens.defvjp(lambda x, move: (rows_of_tokens(x, move), move), lambda move, d: (sums_of_pairs(d, move), None))
sums_of_pairs.defvjp(lambda y, move: (sums_of_pairs(y, move), move), lambda move, d: (rows_of_tokens(d, move), None))
rows_of_pairs.defvjp(
    lambda weights, move: (rows_of_pairs(weights, move), move),
    lambda move, d: (move.where_here(_take(d, move.row)), None),
)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")
