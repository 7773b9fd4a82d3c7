"""Global arrays from what each process contributes: its own rows, or a value that all processes share."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def own_rows(batch: NamedSharding, rows: int) -> np.ndarray:
    """Indices of the step's rows that this process's devices hold, ascending, int64.

    Every process has some. If the mesh splits a row over devices of several processes ("context", "tensor"), or copies
    it, each of them has the row.
    """
    ranges = {index[0].indices(rows)[:2] for index in batch.addressable_devices_indices_map((rows,)).values()}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(ranges)])


def from_own_rows(tree, batch: NamedSharding, rows: int):
    """Global arrays [rows, ...] with sharding `batch`. tree: numpy arrays of this process's own_rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch, x, (rows, *x.shape[1:])), tree)


def on_all_devices(tree, mesh):
    """Numpy values that are equal on every process, as arrays replicated over the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    # device_put would first compare the values of all processes, in every step.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)), tree)
