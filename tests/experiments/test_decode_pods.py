"""Decoding on pods: the tables are those of the results, and every point is a rehearsal that can be asked for."""

import json

from llada_jax.pod.step_cost import PARTS
from tests.helpers.command_lines import run
from tests.helpers.experiments import EXPERIMENTS, importable

with importable("decode_pods"):
    import points
    import rehearse
    import report


def test_the_gallery_has_the_tables():
    assert report.BEGIN + report.section() + report.END in report.README.read_text()


def test_results_are_of_points():
    for name in points.SLICES:
        of_slice = {point.key for point in points.POINTS if point.slice == name}
        for key, values in report.recorded(name).items():
            assert key in of_slice and "per_op" not in values
            if values["fits"]:
                assert set(values["seconds"]) == set(PARTS) and values["roofline_seconds"] > 0


def test_points_take_the_mesh_that_generate_takes():
    commands = {(point.slice, point.key): rehearse.command(point) for point in points.POINTS}
    assert len(commands) == len(points.POINTS)
    assert "--config.mesh.tensor=4" in commands["mini_v5p", "rows 1"]  # fewer requests than devices
    assert "--config.mesh.expert=4" in commands["mini_v5p", "rows 16"]
    assert {"--prefill=1024", "--filled=4096"} <= set(commands["flash_v5p", "chunk after 4096"])


def test_a_table_of_what_fits_and_what_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "path_of", lambda name: tmp_path / f"{name}.json")
    seconds = dict.fromkeys(PARTS, 1e-3)
    fits = {"fits": True, "mesh": {"tensor": 4}, "seconds": seconds, "roofline_seconds": 3e-3}
    large = {"fits": False, "mesh": {}, "hbm_bytes": 64 * 2**30, "hbm_capacity_bytes": 32 * 2**30}
    (tmp_path / "mini_v6e.json").write_text(json.dumps({"rows 4": fits, "rows 16": large}))
    first, second = (line.split(" | ") for line in report.passes().splitlines()[2:])
    assert first[:3] == ["| mini, v6e:2x4", "4", "tensor 4"] and first[9:12] == ["6.00", "3.00", "**2.0**"]
    assert first[-3:] == ["667", "1,700", "2,667 |"]  # 4 requests, 1, 2.55 and 4 tokens of each in 6 ms
    assert second[3] == "does not fit: 64 of 32 GiB" and len(second) == len(first)


def test_an_unknown_slice_is_refused():
    done = run([EXPERIMENTS / "decode_pods" / "rehearse.py", "none"])
    assert done.returncode == 2 and "none: no such slice here; there are mini_v5p" in done.stderr
