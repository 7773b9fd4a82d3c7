"""The estimates of public runs: recorded programs give the recorded numbers, and the README has them."""

import json
import lzma

import numpy as np
import pytest

from llada_jax.chips import parse_topology
from llada_jax.pod import hlo
from llada_jax.pod.hlo import Array
from llada_jax.pod.report import band
from tests.helpers.command_lines import run
from tests.helpers.experiments import EXPERIMENTS, importable

with importable("calibration"):
    import calibrate
    import compile as compiling
    import estimate
    import kernels
    import report
    from runs import COMPILERS, RUNS, recorded

RESULTS = {result["name"]: result for result in report.read()}
README = (EXPERIMENTS.parent / "llada_jax" / "pod" / "README.md").read_text()


def test_every_run_says_what_was_run_and_measured():
    for name, run_ in RUNS.items():
        topology = parse_topology(run_.topology)
        assert run_.compiler in COMPILERS and (run_.seconds is None or run_.tflops is None), name
        assert run_.settings["per_device_batch_size"] > 0 and run_.settings["max_target_length"] >= 2048
        assert run_.half == "untimed" or 0.2 < run_.mfu < 0.8
        assert "github.com/AI-Hypercomputer/" in run_.source
        target = f"compile_topology={topology.chip.name}-{topology.num_devices * topology.chip.cores_per_device}"
        assert target in compiling.options(run_)
    halves = [run_.half for run_ in RUNS.values()]
    assert abs(halves.count("fit") - halves.count("test")) <= 3


@pytest.mark.parametrize("name", ["deepseek2_16b_v5p_4"])
def test_a_recorded_program_gives_the_recorded_estimate(name):
    with importable("calibration"):
        values, recorded = estimate.result(name, estimate.lines_of(name)), dict(RESULTS[name])
    for key in ("parts", "hidden_seconds", "predicted_seconds"):
        assert values.pop(key) == pytest.approx(recorded.pop(key), rel=1e-6)
    assert values == recorded


def test_the_compiler_of_the_run_needs_the_memory_of_the_run():
    values = RESULTS["deepseek2_16b_v5p_4"]
    assert values["predicted_bytes"] == pytest.approx(values["measured_bytes"], rel=0.01)


def test_the_readme_has_the_table():
    assert report.section(report.read()) in README


def test_estimates_print_the_band_of_the_table():
    results = report.read()
    assert json.loads(report.BAND.read_text()) == report.written_band(results)
    least, most = (f"{end(map(report.ratio, results)):.2f}" for end in (min, max))
    assert f"{least} to {most} times the measured one" in band("v5p") and f"{len(results)} training runs" in band("v5p")
    assert "none on v4" in band("v4") and "none on" not in band("v5p")


def test_causal_tiles_are_those_with_a_visible_pair():
    for length, queries, keys in ((2048, 512, 512), (2048, 512, 256), (2048, 256, 1024)):
        mask = np.tril(np.ones((length, length), bool))
        tiles = mask.reshape(length // queries, queries, length // keys, keys).any((1, 3))
        whole = max(tiles.shape)
        assert kernels.causal_tiles(length, queries, keys, False, whole) == tiles.sum()
        assert kernels.causal_tiles(length, queries, keys, True, whole) == tiles.sum()
    assert kernels.causal_tiles(4096, 1024, 1024, False, 2) == 1 + 2 + 2 + 2  # a window of two tiles


def test_listed_tiles_are_those_of_the_windows_too():
    """gemma4-26b: 4096 tokens in tiles of 1024; five layers of six see a window of 1024 tokens, the sixth all."""
    program, _ = recorded("gemma4_26b_tpu7x_64")
    module = hlo.parse(lzma.decompress(program.read_bytes()).decode())
    listed = {}
    for computation, op in kernels.calls(module):
        if "splash_mha_fwd" in op.op_name:
            operands = [x for name in op.operands for x in module.operand(computation, name).result]
            listed.setdefault(kernels._has_mask_tiles(operands), set()).add(kernels._listed_tiles(operands))
    query, key = np.ogrid[:4096, :4096]
    causal = key <= query

    def tiles(mask):
        return int(mask.reshape(4, 1024, 4, 1024).any(axis=(1, 3)).sum())

    assert listed == {False: {tiles(causal)}, True: {tiles(causal & (query - key < 1024))}}


def test_grouped_matmuls_cost_their_tiles():
    """Twice the columns are twice the tiles, and the cycles of a tile are those of its schedule."""
    chip = parse_topology("v5e:2x2").chip
    regions = [{"matmuls": False, "once": 10, "looped": 0}, {"matmuls": True, "once": 10**6, "looped": 0}]
    kernel = {"bounds": [1, None, 1], "blocks": [[512, 1024], [1, 1024, 1024], [512, 1024]], "prefetched": 4}
    kernel |= {"options": {}, "split": False, "regions": regions, "step": 90, "launch": 0}
    rows, groups = 4096, 4

    class Call:
        result = (Array("bf16", (rows, 1024)),)

    operands = [Array("bf16", (rows, 1024)), Array("bf16", (groups, 1024, 1024))]
    one = kernels._grouped(Call, operands, kernel, chip, groups)
    two = kernels._grouped(Call, operands, kernel | {"bounds": [2, None, 1]}, chip, groups)
    assert two.seconds == pytest.approx(2 * one.seconds)
    visits = one.seconds * chip.bundle_rate / (10**6 + 100)
    assert visits == pytest.approx(round(visits)) and rows / 512 <= visits <= rows / 512 + groups
    assert one.flops == 2 * rows * 1024 * 1024


def test_unknown_runs_are_refused():
    for program in ("calibrate.py", "estimate.py"):
        done = run([EXPERIMENTS / "calibration" / program, "nothing_v5p"])
        assert done.returncode == 2 and done.stderr.startswith("error: nothing_v5p: no such ")


def test_results_have_every_field():
    for path in (EXPERIMENTS / "calibration" / "results").glob("*.json"):
        values = json.loads(path.read_text())
        assert values["half"] == RUNS[path.stem].half and values["versions"]["libtpu"] and values["source"]
        assert sum(values["parts"].values()) == pytest.approx(values["predicted_seconds"])


def test_environments_are_made_by_uv(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate.shutil, "which", lambda name: None)
    monkeypatch.setattr(calibrate, "WORK", tmp_path)
    with pytest.raises(calibrate.InputError, match="uv: not found"):
        calibrate.environment("2025-09")
