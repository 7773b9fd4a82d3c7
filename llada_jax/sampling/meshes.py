"""The mesh of decoding over the devices of a slice: those worth trying, and the one that is taken unless told.

    tensor     every device has all rows, and its part of each head's and expert's width: two sums per layer over all
    expert     every device has its own rows and whole experts; tokens are gathered and their sums scattered back
    both       groups of devices share the experts out, and split widths within the group

With fewer rows than groups, all groups have all rows, and sum up what their experts add.

A dense model has rows instead of experts to share out: axis "data", with weights copied.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from llada_jax import sharding
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig

LANES = 128  # of a register


def candidates(model: ModelConfig, devices: int, rows: int) -> list[dict[str, int]]:
    """{axis: size} of each mesh over `devices` devices that splits the model and the rows evenly, most tensor first.

    Of a mixture of experts, no expert into parts that are no whole registers, unless all are so narrow; and fewer rows
    than groups of devices need not be split.
    """
    found = []
    for tensor in (n for n in range(devices, 0, -1) if devices % n == 0):
        shared = devices // tensor
        widths = (model.num_heads, model.moe_intermediate_size if model.is_moe else model.intermediate_size)
        if any(width % tensor for width in widths) or (rows % shared and not (model.is_moe and rows < shared)):
            continue
        if model.is_moe and (model.num_experts % shared or (widths[1] % LANES == 0 and widths[1] // tensor % LANES)):
            continue
        found.append({_shared_axis(model): shared, "tensor": tensor})
    return found


def name_of(sizes: Mapping[str, int]) -> str:
    """Its axes that are split, e.g. "expert 2, tensor 2"."""
    return ", ".join(f"{axis} {sizes[axis]}" for axis in sharding.MESH_AXES if sizes.get(axis, 1) > 1) or "one device"


def default(model: ModelConfig, devices: int, rows: int, memory: int | None = None) -> dict[str, int]:
    """The candidate that is taken unless told: that with the fewest parts of widths, the fastest where it was estimated
    (llada_jax/pod/README.md), of those whose bfloat16 weights take at most half of a device's `memory` bytes; if none
    do, that with the most parts. Where no mesh splits the rows, that with the most parts, too. One device where no mesh
    over all of them is a candidate.
    """
    tried = candidates(model, devices, rows) or [{"tensor": 1}]
    evenly = [sizes for sizes in tried if rows % sizes.get(_shared_axis(model), 1) == 0]
    fitting = [sizes for sizes in evenly if memory is None or _weight_bytes(model, sizes) <= memory / 2]
    return fitting[-1] if fitting else tried[0]


def _weight_bytes(model: ModelConfig, sizes: Mapping[str, int]) -> float:
    """Of bfloat16 weights, on a device."""
    leaves = parameters.leaves(model).values()
    routed = sum(math.prod(declared.shape) for declared, _ in leaves if declared.per_expert)
    rest = parameters.count(model) - routed
    return 2 * (rest + routed / sizes.get("expert", 1)) / sizes.get("tensor", 1)


def from_text(text: str, model: ModelConfig, rows: int, devices: Sequence[jax.Device]) -> Mesh | None:
    """The mesh of a flag: "auto" is `default` over all devices, "one" is None, as is any mesh of one device;
    "expert=2,tensor=2" is that, over the first so many. Raises InputError on another text, or on too few devices.
    """
    stats = devices[0].memory_stats() or {}
    sizes = _sizes(text, model, rows, len(devices), stats.get("bytes_limit"))
    count = math.prod(sizes.values())
    if count > len(devices):
        raise InputError(f"--mesh={text}: {count} devices, there are {len(devices)}")
    if count == 1:
        return None
    return sharding.make_mesh(**{"data": 1} | sizes, devices=list(devices[:count]))


def _sizes(text: str, model: ModelConfig, rows: int, devices: int, memory: int | None) -> dict[str, int]:
    if text in ("auto", "one"):
        return default(model, devices, rows, memory) if text == "auto" else {}
    known = (
        ("data", "expert", "tensor") if model.is_moe else ("data", "tensor")
    )  # without experts there is no such axis
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in known or axis in sizes or not size.isdecimal() or int(size) < 1:
            example = ",".join(f"{axis}=2" for axis in known[-2:])
            raise InputError(f"--mesh={text}, expected auto, one, or sizes of {', '.join(known)}: {example}")
        sizes[axis] = int(size)
    for axis, total in (("expert", model.num_experts), ("tensor", model.num_heads)):
        if axis in sizes and total % sizes[axis]:
            raise InputError(f"--mesh={text}: {axis}={sizes[axis]} does not divide {total}")
    return sizes


def _shared_axis(model: ModelConfig) -> str:
    return "expert" if model.is_moe else "data"
