"""What each process of a run contributes to the arrays of a step: its own rows, or the same value as all others."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def own_rows(batch: NamedSharding, rows: int) -> np.ndarray:
    """The rows of a step that devices of this process hold, ascending; int64.

    Every process has some. Where the mesh splits each row over devices of several processes ("context", "tensor"), or
    copies it, they all have it.
    """
    held = {index[0].indices(rows)[:2] for index in batch.addressable_devices_indices_map((rows,)).values()}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(held)])


def from_own_rows(tree, batch: NamedSharding, rows: int):
    """Arrays of `rows` rows laid out as `batch`, from this process's own_rows of each: a tree of numpy arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch, x, (rows, *x.shape[1:])), tree)


def on_all_devices(tree, mesh):
    """Numpy values, the same on every process, as arrays that every device of the mesh holds."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    # device_put would compare the values of all processes first, at every step.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)), tree)
