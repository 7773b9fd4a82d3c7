"""The pieces of the gallery: configs of the conversion, and the tables and pictures of what was measured."""

import json
import re
from pathlib import Path

import pytest

from llada_jax.errors import InputError
from llada_jax.training.config import check, phases
from tests.helpers.experiments import EXPERIMENTS, load


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_the_conversion_keeps_checkpoints_at_even_distances_to_its_end(form):
    config = load("conversion", "config").get_config(form)
    scored = re.search(rf"\b{form}\) .* rows=(\d+)", (EXPERIMENTS / "conversion" / "run.sh").read_text()).group(1)
    assert config.data.held_out_rows >= int(scored), "what is scored is not trained on"
    check(config)
    steps = sum(phase.steps for phase in phases(config))
    assert steps % config.checkpoint.keep_every == 0 and steps // config.checkpoint.keep_every >= 5
    assert config.optimizer.decay_steps < steps and phases(config)[0].block_size == 1
    tokens = f"{steps * config.batch.rows * config.data.length // (1000 if form == 'cpu' else 10**6)}"
    assert re.search(rf"\b{tokens} (thousand|million) tokens", (EXPERIMENTS / "conversion" / "run.sh").read_text())


def test_the_recorded_conversion_on_an_accelerator_is_of_its_form():
    recorded = json.loads((EXPERIMENTS / "conversion" / "results" / "h200.json").read_text())
    config = load("conversion", "config").get_config("h200")
    check(config)
    assert recorded["step_tokens"] == config.batch.rows * config.data.length
    assert recorded["measured"][-1]["step"] == sum(phase.steps for phase in phases(config))
    assert {row["block_size"] for row in recorded["phases"]} == {phase.block_size for phase in phases(config)}
    table = load("conversion", "report").table(recorded).splitlines()[2:7]
    assert all(row in (EXPERIMENTS / "README.md").read_text() for row in table), "the gallery shows what was recorded"


def test_checkpoints_without_samples_are_in_the_table(tmp_path, capsys):
    folder = measured(tmp_path)
    (folder / "measured" / "10.block32.jsonl").unlink()
    load("conversion", "report").main(str(folder), str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "| 8.000 ± 0.250 | n/a | n/a | n/a | n/a |" in printed and "10 at 0.3" not in printed


def test_modules_of_packages_are_written_once_each(tmp_path, monkeypatch):
    stdlib_text = load("common", "stdlib_text")
    site = tmp_path / "site"
    long = "x = 1\n" * 100
    files = {"a/b.py": long, "a/copy.py": long, "a/short.py": "y = 1\n", "a/tests/t.py": "t" + long, "c.py": "c" + long}
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (site / "bad.py").write_bytes(b"# coding: nosuch\n" + long.encode())
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(site), "purelib": str(site)})
    stdlib_text.main(tmp_path / "out", packages=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "packages.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["a/b.py", "c.py"] and rows[0]["text"] == long


def test_an_unknown_form_is_named():
    with pytest.raises(InputError, match="'tpu', expected cpu, h200 or gpu"):
        load("conversion", "config").get_config("tpu")


def measured(folder: Path) -> Path:
    """What run.sh leaves in FOLDER, of two checkpoints."""
    for name in ("wsd", "ar", "measured"):
        (folder / name).mkdir()
    (folder / "ar" / "config.json").write_text('{"code": "llada_jax, commit 1"}')
    (folder / "wsd" / "config.json").write_text('{"batch": {"rows": 2}, "data": {"length": 128}}')
    rows = [{"step": step, "phase": "warmup", "block_size": 1 + 3 * (step > 5), "loss": 1.0} for step in (5, 10)]
    (folder / "wsd" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "seconds").write_text("60\n30\n")
    for step, gained in ((0, 0.0), (10, 1.0)):
        names = {"ar": 2.5 + gained / 10, "block 1": 2.5 + gained / 10, "block 4": 7 - gained, "full": 9 - gained}
        entries = {name: {"nats": nats, "stderr": 0.25} for name, nats in names.items()}
        (folder / "measured" / f"{step}.json").write_text(json.dumps({"rows": 4} | entries))
        for block in (4, 32):
            answers = [
                {"prompt": "a", "threshold": t, "answer": f"{step} at {t}", "tokens": 8, "forward_passes": passes}
                for t, passes in ((0.95, 8), (0.3, 8 - 4 * gained), (0.3, 8))
            ]
            path = folder / "measured" / f"{step}.block{block}.jsonl"
            path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return folder


def test_the_report_of_a_conversion(tmp_path, capsys):
    report = load("conversion", "report")
    out = tmp_path / "out"
    report.main(str(measured(tmp_path)), str(out))
    printed = capsys.readouterr().out
    row = "2.600 ± 0.250 | 2.600 ± 0.250 | 6.000 ± 0.250 | 8.000 ± 0.250 | 1.00 | 1.33 | 1.00 | 1.33 |"
    assert f"| 2,560 | {row}" in printed
    assert "AR loss before 2.500, NELBO at block size 1 after 2.600 nats per token: +0.100" in printed
    assert "1.5 minutes" in printed and "2,560  '10 at 0.3'" in printed
    picture = (tmp_path / "out.svg").read_text()
    assert "tokens seen" in picture and all(f"block {size}" in picture for size in (1, 4)) and "full" in picture
    report.main(f"{out}.json")  # what was recorded prints the same
    assert capsys.readouterr().out == printed


def test_the_prompts_cover_both_thresholds_evenly():
    report = load("conversion", "report")
    rows = [json.loads(line) for line in (EXPERIMENTS / "conversion" / "prompts.jsonl").read_text().splitlines()]
    asked = {t: [row["prompt"] for row in rows if row["threshold"] == t] for t in report.THRESHOLDS}
    assert asked[0.95] == asked[0.3] and sum(map(len, asked.values())) == len(rows)


def test_the_report_of_long_contexts(tmp_path, capsys):
    report = load("long_context", "report")
    folder = tmp_path / "runs"
    folder.mkdir()
    for context in (512, 4096):
        for yarn in (1.0, 2.0):
            result = dict.fromkeys(report.FIELDS, 0) | {
                "context": context, "yarn": yarn, "questions": 10, "score": 0.5, "score_stderr": 0.1, "seconds": 20.0,
                "peak_memory_bytes": 3 << 30,
            }  # fmt: skip
            (folder / f"{context}.yarn{yarn:g}.json").write_text(json.dumps(result))
    report.main(str(folder), str(tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 512 | no | 50 ± 10 | 10 | 2.0 | 3.00 |" and lines[-1].startswith("| 4,096 | x 2 | 50")
    assert "YaRN x 2" in (tmp_path / "out.svg").read_text()


def test_the_table_of_throughput_takes_ratios_within_a_seed(tmp_path):
    throughput = load("post_training", "throughput")
    rows = []
    for seed, scale in ((0, 1.0), (1, 3.0)):
        for stage, gain in (("sft_longer", 1.0), ("cap", 1.5)):
            speeds = {"tokens_per_forward": scale * gain, "tokens_per_second": 100 * scale * gain}
            rows.append({"seed": seed, "stage": stage, "score": 0.5} | speeds)
    assert "CAP writes 1.50 ± 0.00 times the tokens per forward and 1.50 ± 0.00 a second." in throughput.table(rows)
    throughput.draw(rows, str(tmp_path / "out.svg"))
    assert "tokens a second" in (tmp_path / "out.svg").read_text()


def test_pictures_and_data_that_the_gallery_names_are_there():
    text = (EXPERIMENTS / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert name.startswith("http") or (EXPERIMENTS / name).exists(), name
