"""Rows of a batch in parts that pass one after the other, so that only one part's activations are in memory."""

import jax
import jax.numpy as jnp


def split_rows(tree, micro_batches: int):
    """Leaves [micro_batches, rows / micro_batches, ...]: each takes rows of every shard of the batch."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0), tree)


def join_rows(tree):
    """Inverse of split_rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def map_rows(function, tree, micro_batches: int):
    """`function` of each micro-batch, one after the other; the results joined."""
    if micro_batches == 1:
        return function(tree)
    return join_rows(jax.lax.map(function, split_rows(tree, micro_batches)))


def sum_over_rows(function, tree, micro_batches: int):
    """`function` of each micro-batch, one after the other; the results added."""
    return function(tree) if micro_batches == 1 else sum_over(function, split_rows(tree, micro_batches))


def sum_over(function, parts):
    """The sum of `function` of each part: leaves of `parts` have the parts leading."""

    def one(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    # The sums start as zeros of the shapes that `function` returns.
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    return jax.lax.scan(one, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first), parts)[0]
