"""Kernels that stream cost their copies, or their arithmetic where that takes longer."""

import pytest

from llada_jax.chips import CHIPS, parse_topology
from llada_jax.pod.hlo import Array
from llada_jax.pod.stream_cost import stream_costs
from tests.pod.test_schedule_reader import SLICES

STEPS = 32
BLOCK = 512 * 512 * 4


def seconds(terms, chip, steps, compiled=STEPS):
    arguments = {"terms": terms, "steps": compiled}
    costs = stream_costs("tests.helpers.pod_programs:stream", arguments, compiled, "glue", SLICE[chip])
    blocks = (Array("f32", (512 * steps, 512), True),)
    part, cost = costs["stream"](blocks, blocks)
    assert part == "glue" and cost.flops == 0
    return cost.seconds


SLICE = {name: parse_topology(text) for name, text in SLICES.items()}


@pytest.mark.parametrize("name", ["v5p", "v6e"])
def test_light_work_costs_its_bytes(name):
    chip = CHIPS[name]
    assert seconds(0, name, 5) == pytest.approx(5 * 2 * BLOCK * chip.devices / chip.hbm_bandwidth)


def test_heavy_work_costs_its_schedule_shared_by_the_cores():
    """An exponential takes a slot of the vector unit at least: 256 registers of a block, 40 times."""
    chip = CHIPS["v5p"]
    least = 40 * 256 / chip.clock / chip.cores_per_device
    assert 5 * least <= seconds(42, "v5p", 5) <= 5 * 20 * least


@pytest.mark.parametrize("chip,compiled", [("v5p", 2), ("v5p", 1), ("v6e", 1), ("v5e", 1)])
def test_a_kernel_of_one_step_a_core_has_no_loop_and_costs_that_step(chip, compiled):
    cores = min(CHIPS[chip].cores_per_device, compiled)
    expected = seconds(42, chip, compiled) * CHIPS[chip].cores_per_device / cores
    assert seconds(42, chip, compiled, compiled) == pytest.approx(expected, rel=0.1)
