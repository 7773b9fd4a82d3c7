"""The estimators on programs whose cost is known."""

import pytest

from llada_jax.chips import CHIPS
from llada_jax.errors import InputError
from llada_jax.pod.aot import compile_program
from llada_jax.pod.schedule_reader import region_costs

SLICES = {name: f"{name}:{chip.slices[1] if name[-1] == 'e' else chip.slices[0]}" for name, chip in CHIPS.items()}


def costs(function, arguments, topology, names):
    (kernel,) = compile_program(f"tests.helpers.pod_programs:{function}", arguments, topology).kernels.values()
    regions = region_costs(kernel, names)
    assert sum(cost.bundles for cost in regions.values()) == kernel.program.end  # every bundle is in one region
    return regions


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_matmul_costs_its_flops(chip):
    body = costs("matmul", {"tile": 512, "dtype": "bfloat16"}, SLICES[chip.name], ["body"])["body"]
    floor = 512**3 / chip.macs_per_cycle
    assert body.mxu_cycles == floor
    assert floor <= body.cycles <= 1.4 * floor


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_so_does_one_with_a_transposed_operand(chip):
    arguments = {"tile": 512, "dtype": "bfloat16", "contract": 0}
    body = costs("matmul", arguments, SLICES[chip.name], ["body"])["body"]
    assert body.mxu_cycles == 512**3 / chip.macs_per_cycle


def test_float32_operands_cost_the_matrix_unit_as_much_per_row():
    """The default precision passes float32 through as bfloat16."""
    body = costs("matmul", {"tile": 512, "dtype": "float32"}, "v5p:2x2x1", ["body"])["body"]
    assert body.mxu_cycles == 512**3 / CHIPS["v5p"].macs_per_cycle


@pytest.mark.parametrize("chip,stores", [("v5p", 1), ("tpu7x", 2)])
def test_an_elementwise_kernel_costs_its_stores(chip, stores):
    body = costs("increment", {"tile": 512}, SLICES[chip], ["body"])["body"]
    registers = 512 * 512 // 1024
    assert body.mxu_cycles == 0 and body.slots["VSTORE"] == registers
    assert registers / stores <= body.bundles <= registers / stores + 64


def test_conditional_regions_in_program_order():
    regions = costs("conditional", {"tile": 512}, "v5p:2x2x1", ["increment", "matmul"])
    assert regions["increment"].mxu_cycles == regions["step"].mxu_cycles == 0
    assert regions["matmul"].mxu_cycles == 2048
    assert 128 <= regions["increment"].bundles < 300 and 0 < regions["step"].bundles < 300


@pytest.mark.parametrize(
    "chip,semantics,split", [("v5p", "parallel", True), ("v5p", "arbitrary", False), ("v6e", "parallel", False)]
)
def test_a_parallel_axis_is_split_between_the_cores_of_a_device(chip, semantics, split, tmp_path, monkeypatch):
    """And the program is not put into JAX's cache, from which one of an absent device cannot be loaded."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    arguments = {"tile": 512, "semantics": semantics}
    (kernel,) = compile_program("tests.helpers.pod_programs:increment", arguments, SLICES[chip]).kernels.values()
    assert kernel.split == split
    assert not list(tmp_path.rglob("*-cache"))


def test_other_regions_than_named_are_refused():
    with pytest.raises(ValueError, match="has 2 vector regions"):
        costs("conditional", {"tile": 512}, "v5p:2x2x1", ["one"])


def test_what_the_compiler_refuses_is_one_line():
    with pytest.raises(InputError, match="vmem|VMEM|memory"):
        compile_program("tests.helpers.pod_programs:too_large", {}, "v5p:2x2x1", schedules=False)
