"""The bars that rows of the attention bench are held against."""

import pytest

from llada_jax.bench.bars import bars


def row(
    implementation, topology="v5p:2x2x1", mean=0, cycles=100.0, full=1200, partial=1300, keys=512, direction="both"
):
    prefix = "forward " if direction == "both" else ""
    classes = {
        f"{prefix}{name}": {"bundles": bundles, "mxu_cycles": 0.0, "tiles": 1}
        for name, bundles in (("full", full), ("partial", partial))
    }
    return {
        "implementation": implementation, "length": 4096, "mean_document": mean, "pass": direction, "cycles": cycles,
        "classes": classes, "tile_pairs": {"forward": 512 * keys}, "temp_bytes": 2**27, "topology": topology,
    }  # fmt: skip


def test_bars_of_v5p():
    rows = [row("llada"), row("llada", mean=1024, cycles=40.0), row("splash_static", partial=3414)]
    rows += [row("splash_static", mean=1024, cycles=100.0), row("splash_tiles", mean=1024, cycles=50.0)]
    found = list(bars(rows, 128))
    assert [bar.value for bar in found] == pytest.approx([1200 / 1024, 1300 / 3414, 0.125, 0.4, 0.8])
    assert [str(bar).rpartition(" ")[2] for bar in found] == ["met"] * 4 + ["MISSED"]


def test_tiles_of_other_sizes_compare_by_their_pairs():
    """Ours of 1024 keys against splash's of 512."""
    rows = [row("llada", "v6e:2x2", full=1116, keys=1024, direction="forward")]
    rows += [row("splash_tiles", "v6e:2x2", full=861, direction="forward")]
    (bar,) = bars(rows, 128)
    assert bar.value == pytest.approx(558 / 861) and "splash" in bar.name


def test_rows_without_a_baseline_are_held_to_what_they_can():
    assert len(list(bars([row("llada", direction="forward")], 128))) == 1
    assert not list(bars([row("splash_static"), row("llada", mean=1024)], 128))
