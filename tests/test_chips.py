"""Chips and slices."""

import dataclasses

import pytest

from llada_jax.chips import CHIPS, Chip, parse_topology
from llada_jax.errors import InputError
from llada_jax.pod.topology import slice_devices


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_peak_is_what_the_matrix_units_can_do(chip):
    assert chip.peak_bf16 == pytest.approx(2 * chip.cores * chip.macs_per_cycle * chip.clock)
    assert 1.0e9 < chip.clock < 2.3e9


def test_facts_of_a_chip_are_given_by_name():
    facts = dataclasses.asdict(CHIPS["v5p"])
    assert Chip(**facts) == CHIPS["v5p"]
    with pytest.raises(TypeError):
        Chip(*facts.values())


@pytest.mark.parametrize(
    "name,chips,devices", [("v5p:4x4x8", 128, 128), ("tpu7x:2x2x1", 4, 8), ("v6e:16x16", 256, 256)]
)
def test_slices(name, chips, devices):
    topology = parse_topology(name)
    assert (topology.name, topology.chips, topology.num_devices) == (name, chips, devices)


@pytest.mark.parametrize(
    "name,wraps",
    [
        ("v5p:4x4x8", (True, True, True)), ("v5p:2x4x4", (False, False, False)), ("tpu7x:4x4x4", (True, True, True)),
        ("v6e:8x16", (False, True)), ("v5e:8x8", (False, False)),
    ],
)  # fmt: skip
def test_which_sides_close_a_ring(name, wraps):
    assert parse_topology(name).wraps == wraps


@pytest.mark.parametrize(
    "name,message",
    [
        ("v3:2x2x1", "unknown chip"),
        ("v4:16x16x20", "4096 chips"),
        ("v5p", "expected sides"),
        ("v5p:2x2xa", "expected sides"),
        ("v5p:3x3x3", "no such slice"),
        ("v5p:8x4x4", "ascending"),
        ("v5p:16x16x28", "6144 chips"),
        ("v6e:4x4x4", "no such slice"),
        ("v5e:32x32", "v5e has 1x1"),
    ],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    "name,shape",
    [
        ("v4:4x4x4", (4, 4, 4)), ("v5e:1x1", (1, 1)), ("v6e:2x4", (2, 4)), ("v5p:2x2x4", (2, 2, 4)),
        ("tpu7x:4x4x4", (4, 4, 4, 2)),
    ],
)  # fmt: skip
def test_libtpu_knows_them(name, shape):
    devices = slice_devices(parse_topology(name))
    assert devices.shape == shape
    assert devices.reshape(-1)[0].device_kind == parse_topology(name).chip.device_kind
    assert tuple(devices.reshape(-1)[-1].coords)[:2] == (shape[0] - 1, shape[1] - 1)


@pytest.mark.parametrize(
    "topology,name,only",
    [
        ("v5p:4x4x4", "v5p-128", True),
        ("v5p:2x2x1", "v5p-8", True),
        ("v5p:4x4x8", "v5p-256", True),
        ("v5p:4x8x8", "v5p-512", False),  # or 4x4x16
        ("v5p:8x8x8", "v5p-1024", False),
        ("v5p:4x4x12", "v5p-384", True),
        ("v6e:8x8", "v6e-64", True),
        ("v5e:4x4", "v5litepod-16", True),
        ("tpu7x:4x4x4", "tpu7x-128", True),
        ("v4:2x2x1", "v4-8", True),
    ],
)
def test_names_of_accelerators(topology, name, only):
    topology = parse_topology(topology)
    assert (topology.accelerator_type, topology.is_the_only_one) == (name, only)
