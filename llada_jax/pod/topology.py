"""Abstract devices of a TPU slice, for which libtpu compiles on a machine without a TPU."""

import os

import jax
import numpy as np
from jax.experimental import topologies

from llada_jax.chips import Topology
from llada_jax.errors import InputError


def slice_devices(topology: Topology, slices: int = 1) -> np.ndarray:
    """The abstract devices of a slice: an array with one axis per side of the slice, a last axis if a chip has two
    devices, and a first axis if there are several slices.

    Compile under `jax.set_mesh` of a mesh of these devices: Pallas asks the mesh for the chip. Raises InputError if
    libtpu is not installed.
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
    several = {"num_slices": slices} if slices > 1 else {}
    # By default it gives each TensorCore of a v4 as a device; the cloud joins the two of a chip.
    joined = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    # Without being told it assumes sides that do not wrap, and lowers gathers over three of them to all-reduces.
    wrap = topology.wraps + (False,) * (3 - len(topology.shape))
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, wrap=wrap, **joined, **host, **several
    )
    devices = sorted(description.devices, key=lambda d: (slice_index(d), *d.coords, d.core_on_chip))
    expected = topology.num_devices * slices
    if len(devices) != expected:
        raise RuntimeError(f"libtpu gives {len(devices)} devices for {slices} x {topology.name}, expected {expected}")
    per_chip = (topology.chip.devices,) if topology.chip.devices > 1 else ()
    return np.array(devices).reshape(*((slices,) if slices > 1 else ()), *topology.shape, *per_chip)


def slice_index(device) -> int:
    """The slice of an abstract device; 0 for a single slice, whose devices have no index."""
    return getattr(device, "slice_index", 0)


def one_device(topology: Topology) -> jax.sharding.Mesh:
    """A mesh of the first device of a slice, for programs of a single device."""
    return jax.sharding.Mesh(slice_devices(topology).reshape(-1)[:1], ("device",))
