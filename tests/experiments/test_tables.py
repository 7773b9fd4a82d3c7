"""The tables of the gallery are those of the recorded numbers."""

import json

import pytest

from tests.helpers.experiments import EXPERIMENTS, load

GALLERY = (EXPERIMENTS / "README.md").read_text()


def test_the_table_of_post_training():
    files = sorted((EXPERIMENTS / "post_training" / "results" / "tiny").glob("*.json"))
    printed = load("post_training", "report").table([json.loads(file.read_text()) for file in files])
    table, _, findings = printed.partition("\n\n")
    assert table in GALLERY
    for number in ("1.36 ± 0.02", "1.49 ± 0.03", "70.4 ± 2.3"):  # what the words say: CAP's gains, DPO's preference
        assert number in findings and number in GALLERY


def test_the_table_of_the_decoding_sweep():
    (file,) = (EXPERIMENTS / "decoding_sweep").rglob("*.json")
    rows = json.loads(file.read_text())
    blocks, thresholds = (sorted({row[name] for row in rows}) for name in ("block", "threshold"))
    cells = {(r["block"], r["threshold"]): f"{100 * r['score']:.1f}, {r['tokens_per_forward']:.2f}" for r in rows}
    for block in blocks:
        assert f"| {block} | " + " | ".join(cells[block, threshold] for threshold in thresholds) + " |" in GALLERY


@pytest.mark.parametrize("name", ["smollm2", "cost"])
def test_the_tables_of_long_contexts(name):
    (file,) = (EXPERIMENTS / "long_context").rglob(f"{name}.json")
    assert "\n".join(load("long_context", "report").table(json.loads(file.read_text())).splitlines()[2:]) in GALLERY


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_the_tables_of_conversions(name):
    (file,) = (EXPERIMENTS / "conversion").rglob(f"{name}.json")
    for row in load("conversion", "report").table(json.loads(file.read_text())).splitlines()[2:]:
        assert not row.startswith("| ") or row in GALLERY
