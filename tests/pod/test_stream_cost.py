"""Kernels that stream cost their copies, or their arithmetic where that takes longer."""

import functools

import pytest

from llada_jax.chips import CHIPS, parse_topology
from llada_jax.pod.aot import compile_program
from llada_jax.pod.hlo import Array
from llada_jax.pod.stream_cost import compiled_costs, stream_costs
from tests.helpers import pod_programs
from tests.pod.test_schedule_reader import SLICES

STEPS = 32
SIDE = pod_programs.BLOCK
BLOCK = SIDE**2 * 4
TERMS = 24  # all but two of them exponentials: more work than copying the blocks
HEAVY = {"v5p": (STEPS, 2, 1), "v6e": (STEPS, 1), "v5e": (STEPS, 1)}  # steps


@functools.cache
def heavy(chip):
    """{name: cost} of kernels that do the same work in each of their steps."""
    programs = [["stream", {"terms": TERMS, "steps": steps}] for steps in HEAVY[chip]]
    program = compile_program("tests.helpers.pod_programs:several", {"programs": programs}, SLICES[chip])
    return compiled_costs(program, {f"stream_{TERMS}_{steps}": steps for steps in HEAVY[chip]}, "glue", CHIPS[chip])


def seconds(cost, steps):
    blocks = (Array("f32", (SIDE * steps, SIDE)),)
    part, cost = cost(blocks, blocks)
    assert part == "glue" and cost.flops == 0
    return cost.seconds


@pytest.mark.parametrize("name", ["v5p", "v6e"])
def test_light_work_costs_its_bytes(name):
    arguments = {"terms": 0, "steps": STEPS}
    topology = parse_topology(SLICES[name])
    (cost,) = stream_costs("tests.helpers.pod_programs:stream", arguments, STEPS, "glue", topology).values()
    chip = CHIPS[name]
    assert seconds(cost, 5) == pytest.approx(5 * 2 * BLOCK / chip.stream_bandwidth)


def test_heavy_work_costs_its_schedule_shared_by_the_cores():
    """An exponential takes a slot of the vector unit at least: 256 registers of a block, 22 times."""
    chip = CHIPS["v5p"]
    least = (TERMS - 2) * SIDE**2 / 1024 / chip.bundle_rate / chip.cores_per_device
    assert 5 * least <= seconds(heavy("v5p")[f"stream_{TERMS}_{STEPS}"], 5) <= 5 * 20 * least


@pytest.mark.parametrize("chip,steps", [("v5p", 2), ("v5p", 1), ("v6e", 1), ("v5e", 1)])
def test_a_kernel_of_one_step_a_core_has_no_loop_and_costs_that_step(chip, steps):
    cores = min(CHIPS[chip].cores_per_device, steps)
    expected = seconds(heavy(chip)[f"stream_{TERMS}_{STEPS}"], steps) * CHIPS[chip].cores_per_device / cores
    assert seconds(heavy(chip)[f"stream_{TERMS}_{steps}"], steps) == pytest.approx(expected, rel=0.1)
