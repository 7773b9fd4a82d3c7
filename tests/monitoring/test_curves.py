"""Pictures of runs, and the tool that draws them."""

import json
from pathlib import Path

import pytest

from llada_jax.errors import InputError
from llada_jax.monitoring.curves import known_metrics, phases_of, read_runs
from tests.helpers.command_lines import run_all

ROOT = Path(__file__).parents[2]
ROWS = [
    {"step": 1, "phase": "warmup", "block_size": 1, "loss": 3.0, "tokens_per_second": 10.0},
    {"step": 2, "phase": "stable", "block_size": 32, "loss": 2.0, "tokens_per_second": 12.0},
    {"step": 2, "block_size": 1, "nelbo": 2.5, "nelbo_stderr": 0.1},
    {"step": 2, "block_size": 32, "nelbo": 2.75, "nelbo_stderr": 0.2},
]


def plot(*commands):
    return run_all([[ROOT / "tools" / "plot.py", *arguments] for arguments in commands])


def workdir(folder, name, rows=ROWS):
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    return folder / name


def test_plot_draws_the_runs(tmp_path):
    a, b = workdir(tmp_path, "a"), workdir(tmp_path, "b")
    both, one = plot(
        ["runs", a, b, f"--save={tmp_path / 'runs.svg'}"],
        ["runs", a, f"--save={tmp_path / 'one.png'}", "--metric=nelbo"],
    )
    assert both.returncode == 0, both.stderr
    picture = (tmp_path / "runs.svg").read_text()
    for label in (
        "training loss, nats per token",
        "held-out NELBO",
        "clean tokens per second",
        "a, block 32",
        "b, block 1",
    ):
        assert label in picture
    assert "warmup" in picture and "stable" in picture and "block 32" in picture
    assert one.returncode == 0 and (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


BAD = {
    "no workdir": ["runs"],
    "expected a command, one of runs": ["curves", "A"],
    "/nowhere/metrics.jsonl: no such file": ["runs", "/nowhere"],
    "--metric=nelbow, expected one of loss, nelbo, nelbo_stderr, tokens_per_second": ["runs", "A", "--metric=nelbow"],
    "--save=x.pdf": ["runs", "A", "--save=x.pdf"],
    "named twice": ["runs", "A", "A"],
    "no rows yet": ["runs", "EMPTY"],
}


def test_plot_says_what_is_wrong(tmp_path):
    places = {"A": workdir(tmp_path, "a"), "EMPTY": workdir(tmp_path, "empty", [])}
    commands = [[places.get(argument, argument) for argument in arguments] for arguments in BAD.values()]
    for message, done in zip(BAD, plot(*commands), strict=True):
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_phases_and_metrics_of_rows(tmp_path):
    assert phases_of(ROWS) == [("warmup", 1, 0, 1), ("stable", 32, 1, 2)]
    runs = read_runs([workdir(tmp_path / "x", "a"), workdir(tmp_path / "y", "a")])
    assert list(runs) == [str(tmp_path / "x/a"), str(tmp_path / "y/a")]
    assert known_metrics(runs) == ["loss", "nelbo", "nelbo_stderr", "tokens_per_second"]
    with pytest.raises(InputError, match="metrics.jsonl"):
        read_runs([tmp_path])
