"""Import, load, verify, inspect and export with gs:// paths, of a bucket that is a folder and cannot rename."""

import json

import pytest
from etils.epath import gpath

from llada_jax.bench.convert import differences
from llada_jax.checkpoint import describe, files, merge, weights
from llada_jax.errors import InputError
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint
from tests.helpers.object_store import make_bucket
from tests.helpers.paths import GOLDENS


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    make_bucket(tmp_path, monkeypatch)
    (tmp_path / "b" / "hf").mkdir(parents=True)
    for path in GOLDENS.glob("llada2_tiny/*[!z]"):
        (tmp_path / "b" / "hf" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "b"


def test_there_and_back(bucket):
    import_checkpoint("gs://b/hf", "gs://b/ours")
    assert weights.load_checkpoint("gs://b/ours").lineage["source"] == "gs://b/hf"
    assert weights.verify("gs://b/ours") == []
    assert any("381,600 elements" in line for line in describe.describe_checkpoint(weights.directory_of("gs://b/ours")))
    merge.merge_checkpoints(["gs://b/ours", "gs://b/ours"], "gs://b/mean")
    export_checkpoint("gs://b/mean", "gs://b/back", shard_bytes=300_000)
    assert differences(bucket / "hf", bucket / "back") == []
    assert sorted(path.name for path in bucket.iterdir()) == ["back", "hf", "mean", "ours"]
    with pytest.raises(InputError, match="gs://b/ours: exists already"):
        import_checkpoint("gs://b/hf", "gs://b/ours")


def test_an_interrupted_import_goes_on_and_does_not_look_complete(bucket, monkeypatch, capsys):
    class PulledPlug(BaseException):
        pass

    def pull(*args):
        raise PulledPlug

    finish = files.finish
    monkeypatch.setattr(files, "finish", pull)
    with pytest.raises(PulledPlug):
        import_checkpoint("gs://b/hf", "gs://b/ours")
    with pytest.raises(InputError, match="neither a complete checkpoint"):
        weights.load_checkpoint("gs://b/ours")
    monkeypatch.setattr(files, "finish", finish)
    with pytest.raises(InputError, match="gs://b/ours: holds an incomplete checkpoint"):
        import_checkpoint("gs://b/hf", "gs://b/ours", dtype="bfloat16")
    import_checkpoint("gs://b/hf", "gs://b/ours")
    assert "going on with gs://b/ours" in capsys.readouterr().err
    assert weights.verify("gs://b/ours") == []


def test_no_model_is_seen_before_its_config(bucket, monkeypatch):
    import_checkpoint("gs://b/hf", "gs://b/ours")
    written = []
    write_bytes = gpath.PosixGPath.write_bytes

    def recording(path, data):
        written.append(path.name)
        return write_bytes(path, data)

    monkeypatch.setattr(gpath.PosixGPath, "write_bytes", recording)
    export_checkpoint("gs://b/ours", "gs://b/back")
    assert written[-1] == "config.json"
    before, after = (json.loads((bucket / name / "config.json").read_text()) for name in ("hf", "back"))
    assert before == after
