"""The estimators on programs whose cost is known."""

import functools

import pytest

from llada_jax.chips import CHIPS
from llada_jax.errors import InputError
from llada_jax.pod import aot, hlo
from llada_jax.pod.aot import compile_program
from llada_jax.pod.schedule_reader import counted_cycles, read_schedule, region_costs

SLICES = {name: f"{name}:{chip.slices[1] if name[-1] == 'e' else chip.slices[0]}" for name, chip in CHIPS.items()}


MATMULS = [["matmul", {"tile": 512, "dtype": "bfloat16", "contract": contract}] for contract in (1, 0)]
ARBITRARY, PARALLEL = (["increment", {"tile": 512, "semantics": how}] for how in ("arbitrary", "parallel"))
MORE = {
    "v5p": [["matmul", {"tile": 512, "dtype": "float32"}], ["conditional", {"tile": 512}], ARBITRARY, PARALLEL],
    "v6e": [PARALLEL],
    "tpu7x": [ARBITRARY],
}


@functools.cache
def kernels(chip):
    programs = {"programs": [*MATMULS, *MORE.get(chip, [])]}
    found = compile_program("tests.helpers.pod_programs:several", programs, SLICES[chip]).kernels
    return {name.split(".")[0]: kernel for name, kernel in found.items()}


def costs(chip, name, regions):
    kernel = kernels(chip)[name]
    found = region_costs(kernel, regions)
    assert sum(cost.bundles for cost in found.values()) == kernel.program.end  # every bundle is in one region
    return found


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_matmul_costs_its_flops(chip):
    body = costs(chip.name, "matmul_bfloat16_1", ["body"])["body"]
    floor = 512**3 / chip.macs_per_cycle
    assert body.mxu_cycles == floor
    assert floor <= body.cycles <= 1.4 * floor


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_so_does_one_with_a_transposed_operand(chip):
    body = costs(chip.name, "matmul_bfloat16_0", ["body"])["body"]
    assert body.mxu_cycles == 512**3 / chip.macs_per_cycle


def test_float32_operands_cost_the_matrix_unit_as_much_per_row():
    """The default precision passes float32 through as bfloat16."""
    body = costs("v5p", "matmul_float32_1", ["body"])["body"]
    assert body.mxu_cycles == 512**3 / CHIPS["v5p"].macs_per_cycle


@pytest.mark.parametrize("chip,stores", [("v5p", 1), ("tpu7x", 2)])
def test_an_elementwise_kernel_costs_its_stores(chip, stores):
    body = costs(chip, "increment_arbitrary", ["body"])["body"]
    registers = 512 * 512 // 1024
    assert body.mxu_cycles == 0 and body.slots["VSTORE"] == registers
    assert registers / stores <= body.bundles <= registers / stores + 64


def test_conditional_regions_in_program_order():
    regions = costs("v5p", "conditional", ["increment", "matmul"])
    assert regions["increment"].mxu_cycles == regions["step"].mxu_cycles == 0
    assert regions["matmul"].mxu_cycles == 2048
    assert 128 <= regions["increment"].bundles < 300 and 0 < regions["step"].bundles < 300


@pytest.mark.parametrize(
    "chip,semantics,split", [("v5p", "parallel", True), ("v5p", "arbitrary", False), ("v6e", "parallel", False)]
)
def test_a_parallel_axis_is_split_between_the_cores_of_a_device(chip, semantics, split):
    assert kernels(chip)[f"increment_{semantics}"].split == split


def test_a_program_of_an_absent_device_is_not_cached(tmp_path, monkeypatch):
    """JAX would write it and could not load it."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    program = compile_program("tests.helpers.pod_programs:increment", {"tile": 512}, SLICES["v5p"], schedules=False)
    assert program.hlo and not program.kernels
    assert not list(tmp_path.rglob("*-cache"))


def test_other_regions_than_named_are_refused():
    with pytest.raises(ValueError, match="has 2 vector regions"):
        costs("v5p", "conditional", ["one"])


def test_what_the_compiler_refuses_is_one_line():
    with pytest.raises(InputError, match="vmem|VMEM|memory"):
        compile_program("tests.helpers.pod_programs:too_large", {}, "v5p:2x2x1", schedules=False)


def schedule(*bundles, chip="v5e"):
    """A kernel of the given bundles, each of which stores once; those with a product use a matrix unit for 4 cycles."""
    text = "\n".join(f" {i:#x}   :  {{ {bundle} }}" for i, bundle in enumerate(bundles))
    usage = "== CAPACITY:\nMXU, VSTORE\n 4 1\n== UTILIZATION:\n" + "0 1\n" * len(bundles)
    return read_schedule(text.replace("0x0 ", "  0 ", 1), usage, CHIPS[chip])


@pytest.mark.parametrize("branch", ["target = $region{}", "target bundleno = 99 (0x63), region = {}"])
def test_loops_that_count_to_a_constant_are_counted(branch):
    inner = ["%b = vadd } /* Start region 2 */ {", "%q = scmp.ge.s32.totalorder %s2, 3 /* loop exit test */"]
    inner.append(f"%2 = sbr.rel (!%q) {branch.format(2)}")
    outer = ["%p = scmp.ge.s32.totalorder %s1, 7 /* loop exit test */", f"%1 = sbr.rel (!%p) {branch.format(1)}"]
    kernel = schedule("%c = vadd", "%a = vadd } /* Start region 1 */ {", *inner, *outer, "%d = vadd")
    assert counted_cycles(kernel) == 2 + 7 * (3 + 3 * len(inner))
    unknown = [bundle.replace("%s2, 3", "%s2, %s3") for bundle in inner]
    assert counted_cycles(schedule("%a = vadd } /* Start region 1 */ {", *unknown, *outer)) is None


def test_the_end_of_a_sum_of_products_counts_once_per_sum():
    end = ["%2 = sbr.rel (%p2) target = $region2", "%e = vst", "%f = vst", "%g = nop } /* Start region 2 */ {"]
    body = ["%a = vadd } /* Start region 1 */ {", "%m = vmatmul.bf16.gmra.mxu0 %v1", *end]
    outer = ["%p = scmp.ge.s32.totalorder %s1, 10 /* loop exit test */", "%1 = sbr.rel (!%p) target = $region1"]
    kernel = schedule(*body, *outer)
    always, ended = counted_cycles(kernel), counted_cycles(kernel, contracted=5)
    skipped = 3  # the branch and what it skips
    assert always == 10 * (len(body) + len(outer)) and always - ended == pytest.approx(10 * skipped * (1 - 1 / 5))


def test_equal_operations_share_the_schedule_of_the_one_that_was_dumped(tmp_path):
    bundles, usage = "     0   :  { %a = vadd }\n", "== CAPACITY:\nMXU\n 4\n== UTILIZATION:\n1\n"
    for name, text in (("final_bundles", bundles), ("final_hlo-static-per-bundle-utilization", usage)):
        tmp_path.joinpath(f"12345-first.1-02-{name}.txt").write_text(text)
    tmp_path.joinpath("12345-first.1-01-schedule-analysis_final_bundles.txt").write_text("")
    module = hlo.parse(
        "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0:T(128)} parameter(0)\n"
        "  %first.1 = f32[8]{0:T(128)} negate(%x)\n  %second.1 = f32[8]{0:T(128)} negate(%first.1)\n"
        "  ROOT %third.1 = f32[8]{0:T(128)} abs(%second.1)\n}\n"
    )
    assert aot.operation_cycles(module, tmp_path, CHIPS["v5e"]) == {"first.1": 1, "second.1": 1}
