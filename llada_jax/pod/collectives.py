"""The cost of a collective: the bytes that a ring moves over the links of the torus axes that its groups span.

    all-gather (of B bytes) and reduce-scatter (into shards of B)    B (n - 1) / n   per device
    all-reduce                                                     2 B (n - 1) / n
    all-to-all                                                       B extent / 8, the bisection of the longest axis
    collective-permute                                               B over one link

An all-reduce in a fusion that keeps a device's slice of it is a reduce-scatter.

n: devices per group. A torus axis that wraps around has two one-way links; one that does not has one, as the ends of a
line must pass everything. Groups that span slices use the data-centre network. Latency is ignored: a lower bound.
"""

import dataclasses
import math
import re

import numpy as np

from llada_jax.chips import Topology
from llada_jax.pod.hlo import Module, Operation

_GROUPS = re.compile(
    r"replica_groups=(mesh\[.*?\](?:, device_ids=\(.*?\)\)?)? \{[^:}]*\}|\{\{.*?\}\}|\{\}|"
    r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a mesh, in the order in which the program numbers them.

    axes: {name: size} of the mesh, major first. topology: of one slice. coordinates: int [devices, sides]. slices: int
    [devices], the slice of each device.
    """

    axes: dict[str, int]
    topology: Topology
    coordinates: np.ndarray
    slices: np.ndarray


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective. axes: the mesh axes that its groups span, joined by +. bytes: sent per device. seconds: per run."""

    kind: str
    axes: str
    bytes: float
    seconds: float


def kind_of(op: Operation) -> str | None:
    """The collective that an operation is or starts, else None."""
    kind = op.kind.removesuffix("-start")
    return kind if kind in KINDS else None


def is_scattered(fusion: Operation) -> bool:
    """Whether the fusion is a reduce-scatter that XLA writes as an all-reduce and the slice that a device keeps."""
    return "AllReduceScatterFusion" in fusion.attributes


def collective_cost(
    module: Module, computation: str, op: Operation, devices: Devices, scattered: bool = False
) -> Collective:
    """The cost of one run. scattered: of an all-reduce, is_scattered of the fusion that it is in. Raises ValueError on
    replica groups in an unknown format.
    """
    kind = kind_of(op)
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"
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
        return max(full * extent / (8 if devices.topology.wraps[i] else 4) / bandwidth
                   for i, extent in enumerate(extents))  # fmt: skip
    links = sum(
        2 if extent == devices.topology.shape[i] and devices.topology.wraps[i] else 1
        for i, extent in enumerate(extents)
        if extent > 1
    )
    return moved / (max(links, 1) * bandwidth)


def _axes(group: np.ndarray, devices: Devices) -> str:
    places = np.unravel_index(group, tuple(devices.axes.values()))
    return "+".join(name for name, place in zip(devices.axes, places, strict=True) if len(set(place)) > 1) or "none"


def _group(op: Operation, kind: str, devices: int) -> np.ndarray:
    """Numbers of the devices of the first group; all groups have one form."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.attributes)
        return np.array([int(pairs.group(1)), int(pairs.group(2))])
    if (match := _GROUPS.search(op.attributes)) is None:
        raise ValueError(f"replica groups of {op.name}: {op.attributes[:120]}")
    text = match.group(1)
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return np.array([int(number) for number in listed.group(1).split(",")])
    if text == "{}":
        return np.arange(devices)
    if text.startswith("mesh"):
        return _named_group(text)
    groups, order = re.match(r"\[(\d+),\d+\]<=(.*)", text).groups()
    return _iota(order).reshape(int(groups), -1)[0]


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers 0 .. 7 in that shape, transposed; flat."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(np.prod(_integers(shape))).reshape(_integers(shape))
    return numbers.transpose(_integers(order) if order else None).reshape(-1)


def _named_group(text: str) -> np.ndarray:
    """mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'b'}: the devices along the named axes."""
    mesh, numbers, named = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}$", text).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    named = re.findall(r"'([^']+)'", named)
    flat = _iota(numbers or f"[{math.prod(sizes.values())}]")
    picked = tuple(slice(None) if name in named else 0 for name in sizes)
    return flat.reshape(tuple(sizes.values()))[picked].reshape(-1)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
