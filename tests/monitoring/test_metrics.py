"""metrics.jsonl and the event files beside it."""

import json

import pytest

from llada_jax.errors import InputError
from llada_jax.monitoring.metrics import TIMED, MetricsWriter, read_rows

ROW = {"step": 3, "phase": "warmup", "block_size": 4, "loss": 2.0, "goodput": 0.5, "wall_seconds": {"compile": 7.0}}


def write(workdir, resume_step, *rows):
    writer = MetricsWriter(workdir, resume_step)
    for row in rows:
        writer.write(row, "train")
    writer.close()


def test_losses_are_also_grouped_by_phase_and_block_size_and_groups_by_their_parts(tmp_path):
    write(tmp_path, 0, ROW)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    for tag in ("train/loss", "loss_by_phase/warmup_block_4", "train/goodput", "wall_seconds/compile"):
        assert tag.encode() in content
    assert b"train/phase" not in content and b"train/step" not in content
    assert read_rows(tmp_path) == [ROW]


def test_rows_of_later_steps_are_dropped_on_resume(tmp_path):
    write(tmp_path, 0, *(ROW | {"step": step} for step in range(1, 6)))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, 3, ROW | {"step": 4, "loss": 1.0})
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0)]


def test_fields_that_measure_time_are_named_once():
    assert {"goodput", "wall_seconds", "tokens_per_second", "mfu"} <= TIMED and not TIMED & {"loss", "step", "nelbo"}


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl: no such file"):
        read_rows(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW)[:10])
    with pytest.raises(InputError, match="no rows yet"):
        read_rows(tmp_path)
