"""Import and export killed at random moments: the next run ends in the same tensors, bit for bit."""

import json
import random
from pathlib import Path

import pytest

from llada_jax.bench.convert import differences, write_source
from llada_jax.checkpoint import files, weights
from llada_jax.errors import InputError
from llada_jax.interop import export, huggingface
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint
from llada_jax.model.config import preset
from tests.helpers import command_lines

CONFIG = preset("tiny_moe").replace(hidden_size=256, moe_intermediate_size=256, mask_token_id=None)
SHARD_BYTES = 4_000_000
# Slabs of 100 kB: hundreds of moments at which something is half done.
CHILD = """
import os, signal, sys, threading
from llada_jax.interop import convert, export
from llada_jax.checkpoint import files
files.SLAB_BYTES, files.CHUNK_BYTES = 100_000, 50_000
what, source, out, seconds = sys.argv[1:]
threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
if what == "import":
    convert.import_checkpoint(source, out)
else:
    export.export_checkpoint(source, out, SHARD)
os._exit(0)
""".replace("SHARD", str(SHARD_BYTES))


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(files, "SLAB_BYTES", 100_000)
    monkeypatch.setattr(files, "CHUNK_BYTES", 50_000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(source, checkpoint, its digests) of a small mixture of experts in several shards."""
    folder = tmp_path_factory.mktemp("interrupt")
    write_source(folder / "hf", CONFIG, SHARD_BYTES)
    import_checkpoint(str(folder / "hf"), str(folder / "ours"))
    return folder / "hf", folder / "ours", digests(folder / "ours")


def digests(directory: Path) -> dict:
    return json.loads((directory / "digests.json").read_text())["tensors"]


def killed_after(seconds: float, what: str, source: Path, out: Path) -> int:
    """Exit status of a conversion that is killed after so many seconds of work."""
    return command_lines.run(["-c", CHILD, what, source, out, seconds]).returncode


def kill_and_run_again(what: str, folders, tmp_path: Path, kills: int, seed: int) -> None:
    source, ours, expected = folders
    chooser = random.Random(seed)
    for number in range(kills):
        out = tmp_path / str(number)
        status = killed_after(chooser.uniform(0.02, 0.6), what, source if what == "import" else ours, out)
        assert out.exists() or status == -9
        if what == "import":
            if not out.exists():
                import_checkpoint(str(source), str(out))
            assert digests(out) == expected and weights.verify(out) == []
        else:
            if not out.exists():
                export_checkpoint(str(ours), str(out), SHARD_BYTES)
            assert differences(source, out) == []
        left = {path.name for path in tmp_path.iterdir()} - {str(n) for n in range(kills)}
        assert left <= {f".{number}.resume"} and (status == -9 or not left)


@pytest.mark.parametrize("what", ["import", "export"])
def test_killed(what, folders, tmp_path):
    kill_and_run_again(what, folders, tmp_path, 3, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("what", ["import", "export"])
def test_killed_20_times(what, folders, tmp_path):
    kill_and_run_again(what, folders, tmp_path, 20, seed=1)


class PulledPlug(BaseException):
    """Ends a run as if it had been killed: nothing is cleaned up."""


def test_import_goes_on_where_it_was(folders, tmp_path, monkeypatch, capsys):
    source, _, expected = folders
    read, experts = [], huggingface._read_experts

    def reading(limit):
        def reader(plan, dtype, first, last):
            if len(read) == limit:
                raise PulledPlug
            read.append((plan.name, first))
            value = experts(plan, dtype, first, last)
            assert value.nbytes <= 2**17  # an expert, where the leaf has 16: memory is that of the slabs
            return value

        monkeypatch.setattr(huggingface, "_read_experts", reader)

    reading(limit=20)
    with pytest.raises(PulledPlug):
        import_checkpoint(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    noted = {path.name for path in (tmp_path / ".out.resume").iterdir()}
    before = set(read)
    read.clear()
    reading(limit=None)
    import_checkpoint(str(source), str(tmp_path / "out"))
    assert digests(tmp_path / "out") == expected and weights.verify(tmp_path / "out") == []
    done = {(name, first) for name, first in before if f"{name}.{first}" in noted}
    assert len(done) >= 10 and not done & set(read)
    assert "going on with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_source_starts_anew(folders, tmp_path, monkeypatch, capsys):
    source = tmp_path / "hf"
    source.mkdir()
    for path in folders[0].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(PulledPlug):

        def pull(*_):
            raise PulledPlug

        patched.setattr(huggingface, "_read_experts", pull)
        import_checkpoint(str(source), str(out))
    assert not out.exists() and len(list(tmp_path.iterdir())) == 3
    (source / "config.json").write_text((source / "config.json").read_text().replace("600000.0", "10000.0"))
    import_checkpoint(str(source), str(out))
    assert "going on" not in capsys.readouterr().err
    assert weights.read_config(out)[0].rope_theta == 10_000


def test_export_goes_on_behind_its_last_whole_shard(folders, tmp_path, monkeypatch):
    source, ours, _ = folders
    begun, original = [], export._write_shard

    def stop_at(limit):
        def write_shard(path, *rest):
            if len(begun) == limit:
                raise PulledPlug
            begun.append(path.name)
            original(path, *rest)

        monkeypatch.setattr(export, "_write_shard", write_shard)

    stop_at(2)
    with pytest.raises(PulledPlug):
        export.export_checkpoint(str(ours), str(tmp_path / "hf"), SHARD_BYTES)
    assert not (tmp_path / "hf").exists()
    stop_at(None)
    export.export_checkpoint(str(ours), str(tmp_path / "hf"), SHARD_BYTES)
    assert len(begun) == len(set(begun)) == len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert differences(source, tmp_path / "hf") == []
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_input_leaves_nothing_behind(folders, tmp_path):
    """Not even when it shows late: a damaged tensor is found when its last slab has been read."""
    damaged = tmp_path / "damaged"
    import_checkpoint(str(folders[0]), str(damaged))
    data = max((p for p in (damaged / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    for at in range(50, len(content), 100):  # OCDBT leaves bytes behind that nothing refers to any more
        content[at] ^= 4
    data.write_bytes(content)
    with pytest.raises(InputError, match="damaged|cannot be read"):
        export_checkpoint(str(damaged), str(tmp_path / "hf"), SHARD_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
