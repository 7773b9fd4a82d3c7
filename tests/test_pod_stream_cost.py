"""Kernels that stream cost their copies, or their arithmetic where that takes longer."""

import pytest
from test_pod_schedule_reader import SLICES

from llada_jax.pod.chips import CHIPS, parse_topology
from llada_jax.pod.hlo import Array
from llada_jax.pod.stream_cost import stream_costs

STEPS = 32
BLOCK = 512 * 512 * 4


def seconds(terms, chip, steps):
    costs = stream_costs("pod_programs:stream", {"terms": terms, "steps": STEPS}, STEPS, "glue", SLICE[chip])
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
