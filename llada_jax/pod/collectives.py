"""What a collective costs: the bytes that a ring moves, over the links of the torus axes that its groups span.

    all-gather (of B bytes) and reduce-scatter (into shards of B)    B (n - 1) / n   per device
    all-reduce                                                     2 B (n - 1) / n
    all-to-all                                                       B extent / 8, the bisection of the longest axis
    collective-permute                                               B over one link

n devices of a group; a torus axis that wraps around gives two one-way links, one that does not gives one (the ends of a
line must pass everything). Groups that span slices use the data-centre network. No latency: a lower bound.
"""

import dataclasses
import re

import numpy as np

from llada_jax.pod.chips import Topology
from llada_jax.pod.hlo import Module, Operation

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Devices:
    """Of the mesh, in the order in which the program numbers them.

    axes {name: size}: of the mesh, major first; topology: of one slice; coordinates int [devices, sides];
    slices int [devices].
    """

    axes: dict[str, int]
    topology: Topology
    coordinates: np.ndarray
    slices: np.ndarray


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind; axes: those of the mesh that its groups span, joined by +; bytes that each device sends; seconds."""

    kind: str
    axes: str
    bytes: float
    seconds: float


def kind_of(op: Operation) -> str | None:
    """The collective that an operation is or starts, else None."""
    kind = op.kind.removesuffix("-start")
    return kind if kind in KINDS else None


def collective_cost(module: Module, computation: str, op: Operation, devices: Devices) -> Collective:
    """Of one run. Raises ValueError on groups that it cannot read."""
    kind = kind_of(op)
    group = _group(op, kind, len(devices.slices))
    full = sum(array.bytes for name in op.operands for array in module.operand(computation, name).result)
    n = len(group)
    axes = _axes(group, devices)
    if kind == "all-gather":
        full *= n
    moved = {
        "all-reduce": 2 * full * (n - 1) / n,
        "collective-permute": full,
        "all-to-all": full * (n - 1) / n,
        "ragged-all-to-all": full * (n - 1) / n,
    }.get(kind, full * (n - 1) / n)
    return Collective(kind, axes, moved, _seconds(kind, full, moved, group, devices) if n > 1 else 0.0)


def _seconds(kind: str, full: float, moved: float, group: np.ndarray, devices: Devices) -> float:
    chip = devices.topology.chip
    if len(set(devices.slices[group])) > 1:
        return moved / (chip.dcn_bandwidth / chip.devices)
    bandwidth = chip.ici_bandwidth / chip.devices  # the devices of a chip share its links
    extents = [len(set(side)) for side in devices.coordinates[group].T]
    if kind == "collective-permute":
        return moved / bandwidth
    if kind.endswith("all-to-all"):
        return max(full * extent / (8 if _wraps(devices.topology, i) else 4) / bandwidth
                   for i, extent in enumerate(extents))  # fmt: skip
    links = sum(
        2 if extent == devices.topology.shape[i] and _wraps(devices.topology, i) else 1
        for i, extent in enumerate(extents)
        if extent > 1
    )
    return moved / (max(links, 1) * bandwidth)


def _wraps(topology: Topology, side: int) -> bool:
    """Whether the links of a side close a ring: cubes of 4 x 4 x 4 do, in two dimensions a side of 16."""
    if topology.chip.ici_links == 6:
        return all(length % 4 == 0 for length in topology.shape)
    return topology.shape[side] == 16


def _axes(group: np.ndarray, devices: Devices) -> str:
    places = np.unravel_index(group, tuple(devices.axes.values()))
    return "+".join(name for name, place in zip(devices.axes, places, strict=True) if len(set(place)) > 1) or "none"


def _group(op: Operation, kind: str, devices: int) -> np.ndarray:
    """Numbers of the devices of the first group; all groups have one form."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.attributes)
        return np.array([int(pairs.group(1)), int(pairs.group(2))])
    text = re.search(r"replica_groups=(.*?), (?=[a-z_]+=)", op.attributes + ", end=").group(1)
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return np.array([int(number) for number in listed.group(1).split(",")])
    if text == "{}":
        return np.arange(devices)
    if named := re.match(r"mesh\[(.*?)\] \{(.*?)\}$", text):
        return _named_group(text, named)
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = [int(side) for side in iota.group(3).split(",")]
        order = [int(axis) for axis in iota.group(4).split(",")] if iota.group(4) else range(len(shape))
        return np.arange(devices).reshape(shape).transpose(order).reshape(int(iota.group(1)), -1)[0]
    raise ValueError(f"replica groups of {op.name}: {text[:120]}")


def _named_group(text: str, named: re.Match) -> np.ndarray:
    """mesh['axis_0'=4,'axis_1'=16] {'axis_1'}: the devices along the named axes."""
    sizes = re.findall(r"'([^']+)'=(\d+)", named.group(1))
    wanted = re.findall(r"'([^']+)'", named.group(2))
    if "device_ids" in text or set(wanted) - {name for name, _ in sizes} or ":" in named.group(2):
        raise ValueError(f"replica groups {text[:120]}")
    numbers = np.arange(int(np.prod([int(size) for _, size in sizes]))).reshape([int(size) for _, size in sizes])
    picked = tuple(slice(None) if name in wanted else 0 for name, _ in sizes)
    return numbers[picked].reshape(-1)
