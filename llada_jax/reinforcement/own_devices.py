"""The weights of a run, as the devices of this process alone decode with them.

Training shares its weights out over all devices of all processes. A process decodes by itself, its own rows at its own
pace, over the mesh that `generate` takes by default (sampling/meshes.py). So the weights of training are laid out once
more: shared out over the devices of each process, and the same on every process. They are then in the dtype of the
passes, without which decoding's kernels do not run (attention/decoding/layer.py, experts.stacks_in_place).
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llada_jax import sharding
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.sampling import meshes

_IN_FLOAT32 = ("router", "expert_bias")  # in passes of any dtype (model/router.py)


def decoding_mesh(model: ModelConfig, rows: int) -> Mesh:
    """Over the devices of this process, for `rows` answers decoded together. Raises InputError if they do not fit all
    of these.
    """
    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    sizes = {"data": 1} | meshes.default(model, len(devices), rows, memory)
    if math.prod(sizes.values()) != len(devices):
        raise InputError(f"{rows} answers decoded together (rl.rows, batch.rows) do not fit {len(devices)} devices")
    return sharding.make_mesh(**sizes, devices=devices)


def logical_axes(trained: ModelConfig | Lora) -> dict:
    """Of the weights of the forward pass: those of the model, and of the adapters beside them."""
    if not isinstance(trained, Lora):
        return parameters.logical_axes(trained)
    axes, adapters = parameters.logical_axes(trained.model), parameters.logical_axes(trained)
    return axes | {group: axes[group] | adapters[group] for group in adapters}


@contextlib.contextmanager
def on_own_devices(params, axes: dict, mesh: Mesh, dtype: str | None = None) -> Iterator[dict]:
    """Yields `params` on `mesh`, of this process's devices, and puts that mesh in force. axes: their logical axes.
    dtype: of the passes; None: the weights stay as they are.

    Every process makes this call. The weights are to be dropped before those of training are donated.
    """
    params = params if dtype is None else in_dtype(params, jnp.dtype(dtype))
    specs = jax.tree.map(lambda x, names: sharding.spec(names, x.shape, mesh), params, axes)
    if jax.process_count() == 1:
        laid_out = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    else:
        laid_out = _from_all_processes(params, specs, mesh)
    with jax.set_mesh(mesh):
        yield laid_out


def in_dtype(params, dtype) -> dict:
    """The weights as a pass in `dtype` uses them: it would cast each of those that are wider itself."""

    def cast(path, x):
        wider = x.dtype.itemsize > dtype.itemsize and path[-1].key not in _IN_FLOAT32
        return x.astype(dtype) if wider else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _from_all_processes(params, specs, mesh: Mesh):
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = (jax.process_count(), *mesh.devices.shape)
    names = ("hosts", *mesh.axis_names)
    everywhere = Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
    shardings = jax.tree.map(lambda spec: NamedSharding(everywhere, spec), specs, is_leaf=_is_spec)
    copies = jax.device_put(params, shardings)

    def own(x, spec):
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        layout = NamedSharding(mesh, spec)
        return jax.make_array_from_single_device_arrays(x.shape, layout, [by_device[d] for d in mesh.devices.flat])

    return jax.tree.map(own, copies, specs)


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)
