"""A workdir on a bucket: runs resume there as they do on a disk, and what was written is there when they die."""

import json
import os
import time

import jax
import pytest

from llada_jax.checkpoint import saver, weights
from llada_jax.errors import InputError
from llada_jax.runtime import remote_workdir
from llada_jax.training import loop
from tests.helpers.object_store import make_bucket
from tests.training.test_loop import config_of, metrics_of, small_preset, text  # noqa: F401  fixtures


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    bucket = make_bucket(tmp_path, monkeypatch)
    make = saver._make_checkpointer

    def make_local():
        checkpointer = make()
        save = checkpointer.save
        # Orbax's own writer has no bucket to write to here.
        checkpointer.save = lambda directory, **options: save(bucket.local(directory), **options)
        return checkpointer

    monkeypatch.setattr(saver, "_make_checkpointer", make_local)
    (tmp_path / "b").mkdir()
    return tmp_path / "b"


def test_a_run_on_a_bucket_that_died_goes_on(text, tmp_path, bucket, monkeypatch):  # noqa: F811
    config = config_of(text, data__cache=str(tmp_path / "cache"), checkpoint__every_steps=2)
    config.schedule.update(warmup_blocks=(4,), warmup_steps=(6,), stable_steps=0, decay_blocks=(), decay_steps=())
    config.evaluation.update(every_steps=100, block_sizes=(8,))

    class Died(BaseException):
        pass

    save = loop.SavePolicy.save

    def die_at_4(self, step, *arguments):
        if step == 4:
            self.wait()
            raise Died
        save(self, step, *arguments)

    monkeypatch.setattr(loop.SavePolicy, "save", die_at_4)
    with pytest.raises(Died):
        loop.train(config, "gs://b/run", jax.devices()[:1])
    monkeypatch.setattr(loop.SavePolicy, "save", save)
    assert weights.steps("gs://b/run/checkpoints") == [2]
    loop.train(config, "gs://b/run", jax.devices()[:1])
    assert config.checkpoint.directory == ""  # the caller's config stays as it was
    raw = [json.loads(line) for line in (bucket / "run" / "metrics.jsonl").read_text().splitlines()]
    assert raw[3]["goodput"] > 0 and raw[3]["wall_seconds"]["restore"] > 0 and "mfu" not in raw[3]
    rows = metrics_of(bucket / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6] and "nelbo" in rows[-1]
    assert weights.verify("gs://b/run/checkpoints/6") == []
    assert json.loads((bucket / "run" / "goodput.json").read_text())["wall_seconds"]["redone"] > 0
    assert {"config.json", "goodput.json", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in (bucket / "run").iterdir()
    }
    assert len(list((bucket / "run").glob("events.out*"))) == 2


def test_files_are_copied_when_they_change_and_a_failing_store_is_tried_again(tmp_path, capsys, monkeypatch):
    (tmp_path / "b").mkdir()
    local = tmp_path / "local"
    local.mkdir()
    bucket = make_bucket(tmp_path, monkeypatch)
    folder = remote_workdir.RemoteWorkdir(local, remote_workdir.epath.Path("gs://b/run"))
    (local / "metrics.jsonl").write_text("1\n")
    (local / "x.partial").write_text("")
    assert folder.push() and (tmp_path / "b/run/metrics.jsonl").read_text() == "1\n"
    assert not (tmp_path / "b/run/x.partial").exists()
    with open(local / "metrics.jsonl", "a") as file:
        file.write("2\n")

    def refuse(*arguments, **options):
        raise ConnectionError("503")

    bucket.__dict__["open"] = refuse
    assert not folder.push() and not folder.push()
    assert capsys.readouterr().err.count("503") == 1
    del bucket.__dict__["open"]
    assert folder.push() and (tmp_path / "b/run/metrics.jsonl").read_text() == "1\n2\n"
    os.remove(tmp_path / "b/run/metrics.jsonl")
    assert folder.push() and not (tmp_path / "b/run/metrics.jsonl").exists()  # unchanged here: not copied again


def test_a_store_that_stays_away_is_an_error_that_says_where_the_files_are(text, tmp_path, monkeypatch):  # noqa: F811
    make_bucket(tmp_path, monkeypatch)
    monkeypatch.setattr(remote_workdir.RemoteWorkdir, "push", lambda self: False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = config_of(text, data__cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="gs://b/run: cannot be written to; .*llada_jax_"):
        with remote_workdir.open_workdir("gs://b/run", config) as (folder, _):
            (folder.local / "metrics.jsonl").write_text("1\n")
    assert (folder.local / "metrics.jsonl").exists()


def test_rows_are_not_packed_into_a_bucket(text):  # noqa: F811
    with pytest.raises(
        InputError, match="--workdir=gs://bucket/run: rows cannot be packed there; set config.data.path"
    ):
        loop.train(config_of(text), "gs://bucket/run", jax.devices()[:1])
