"""The devices of a slice that is not there: libtpu compiles for them on a machine that has only a CPU."""

import os

import jax
import numpy as np
from jax.experimental import topologies

from llada_jax.errors import InputError
from llada_jax.pod.chips import Topology


def slice_devices(topology: Topology) -> np.ndarray:
    """The abstract devices of a slice, one axis per side of the slice (and one more where a chip is two devices).

    Compile for them under `jax.set_mesh` of a mesh made from them: Pallas asks the mesh for the chip. Raises InputError
    where libtpu is not installed.
    """
    # Ask no metadata server which chip this machine has, and let several processes compile at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise InputError(f"topology {topology.name}: libtpu is not installed; pip install 'llada_jax[tpu]'") from error
    # libtpu assumes hosts of four chips.
    host = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host)
    devices = sorted(description.devices, key=lambda device: (*device.coords, device.core_on_chip))
    if len(devices) != topology.num_devices:
        raise RuntimeError(f"libtpu gives {len(devices)} devices for {topology.name}, expected {topology.num_devices}")
    per_chip = (topology.chip.devices,) if topology.chip.devices > 1 else ()
    return np.array(devices).reshape(*topology.shape, *per_chip)


def one_device(topology: Topology) -> jax.sharding.Mesh:
    """A mesh of the first device of a slice, to cost the program of a single device."""
    return jax.sharding.Mesh(slice_devices(topology).reshape(-1)[:1], ("device",))
