"""How gcloud and XPK are asked for a slice."""

from llada_jax.chips import CHIPS, Topology
from llada_jax.errors import InputError

# cloud.google.com/tpu/docs/runtimes; tpu7x is served by GKE only.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e",
}  # fmt: skip
# Of the tables of XPK 1.16: slices that it does not know, and the longest side.
_XPK_LACKS = {"v5e": ("1x1", "2x2")}
_XPK_LONGEST_SIDE = 256


def create_command(topology: Topology) -> list[str]:
    """gcloud's command that queues for such a slice, up to its name, and then the flags that say which slice.

    A shape that is not its size's default can be asked for on the alpha track alone: the general one knows the types v2
    to v4 (gcloud 528). Raises InputError where TPU VMs do not have the chip.
    """
    if topology.chip.name not in RUNTIMES:
        raise InputError(f"--topology={topology.name}: GKE alone serves {topology.chip.name}; launch it with xpk")
    return ["gcloud", *([] if topology.is_default else ["alpha"]), "compute", "tpus", "queued-resources", "create"]


def shape_flags(topology: Topology) -> list[str]:
    """Of create_command."""
    if topology.is_default:
        return [f"--accelerator-type={topology.accelerator_type}"]
    return [f"--type={topology.type_name}", f"--topology={topology.shape_name}"]


def xpk_type(topology: Topology) -> str:
    """XPK's --tpu-type. Raises InputError on a slice that XPK does not know."""
    chip = topology.chip
    lacks = _XPK_LACKS.get(chip.name, ())
    if topology.shape_name in lacks:
        known = ", ".join(shape for shape in CHIPS[chip.name].slices if shape not in lacks)
        raise InputError(f"--topology={topology.name}: XPK knows no such slice, of {chip.name} it has {known}")
    if max(topology.shape) > _XPK_LONGEST_SIDE:
        raise InputError(f"--topology={topology.name}: XPK knows sides up to {_XPK_LONGEST_SIDE}")
    return topology.accelerator_type if topology.is_the_only_one else f"{topology.type_name}-{topology.shape_name}"
