import functools
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import tokenizers

from llada_jax import sharding
from llada_jax.checkpoint import files, weights
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS
from tests.helpers import command_lines

_BACKEND = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 508}, unk_token="a"))
TOKENIZER = {"tokenizer.json": _BACKEND.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<eos>"}'}


@functools.cache
def random_weights(name: str, dtype=jnp.float32):
    """(config, params); the expert bias stays float32."""
    config, rng = PRESETS[name], np.random.default_rng(0)
    shapes = parameters.abstract(config, dtype)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), shapes)
    if config.expert_bias:
        params["sparse"]["expert_bias"] = params["sparse"]["expert_bias"].astype(np.float32)
    return config, params


def leaves_of(params, config):
    return iter(parameters.unstack(params, config).items())


def write(out, name="tiny_moe", dtype=jnp.float32, tokenizer=TOKENIZER):
    config, params = random_weights(name, dtype)
    weights.write_weights(out, config, leaves_of(params, config), tokenizer, {"source": "a test"})
    return config, params


def bits_equal(a, b) -> bool:
    def same(x, y):
        x, y = np.asarray(x), np.asarray(y)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(same, a, b))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(directory, config, params) of tiny_moe in bfloat16 with a float32 expert bias; to be left as it is."""
    out = tmp_path_factory.mktemp("written") / "model"
    return out, *write(out, dtype=jnp.bfloat16)


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name,dtype", [("tiny", jnp.float32), ("tiny", jnp.bfloat16), ("tiny_moe", jnp.bfloat16)])
def test_round_trip_is_exact(name, dtype, tmp_path):
    config, params = write(tmp_path / "out", name, dtype)
    model = weights.load_checkpoint(tmp_path / "out")
    assert model.config == config and model.lineage == {"source": "a test"}
    assert bits_equal(model.params, params)
    assert model.tokenizer.files == TOKENIZER
    assert weights.verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_tokenizer(tmp_path):
    write(tmp_path / "out", "tiny", tokenizer={})
    assert weights.load_checkpoint(tmp_path / "out").tokenizer is None


def test_dtype_casts_all_but_the_expert_bias(written):
    directory, _, params = written
    loaded = weights.load_params(directory, "float32")
    assert bits_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    half = weights.load_params(directory, jnp.float16)
    assert half["sparse"]["expert_bias"].dtype == jnp.float32 and half["embedding"].dtype == jnp.float16


def test_load_onto_a_mesh(written):
    directory, config, params = written
    mesh = sharding.make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    shardings = sharding.shardings(parameters.abstract(config), parameters.logical_axes(config), mesh)
    loaded = weights.load_params(directory, shardings=shardings)
    assert bits_equal(loaded, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, shardings))
    cast = weights.load_params(directory, "float32", shardings)
    assert cast["sparse"]["gate"].dtype == jnp.float32
    assert cast["sparse"]["gate"].sharding == shardings["sparse"]["gate"]


@pytest.mark.parametrize("reader", [ocp.PyTreeCheckpointer, ocp.StandardCheckpointer])
def test_plain_orbax_reads_params(written, reader):
    directory, config, params = written
    restored = reader().restore(directory / "params")
    assert bits_equal(restored, dict(leaves_of(params, config)))


def test_large_leaves_are_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    _, params = write(tmp_path / "out")
    assert bits_equal(weights.load_params(tmp_path / "out"), params)
    assert files._chunk_shape((16, 128, 64), 4, 0) == [1, 8, 16]  # experts apart
    assert files._chunk_shape((128, 64), 4, 0) == [8, 16]
    assert files._chunk_shape((0, 3), 4, 0) == [1, 3]


def test_no_chunk_belongs_to_two_slabs(monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(files, "SLAB_BYTES", 4000)
    for shape, axis in {(100, 8, 8): 0, (8, 300): 1, (5000,): 0, (3, 9, 70): 2, (1, 4096): 0}.items():
        length = files.slab_length(shape, 4, axis)
        chunk = files._chunk_shape(shape, 4, axis)
        assert length >= shape[axis] or length % chunk[axis] == 0
        assert np.prod(chunk) * 4 <= 1000


def test_wrong_leaves_are_refused(tmp_path):
    config, params = random_weights("tiny")
    leaves = dict(leaves_of(params, config))
    name = "layers.002.key"

    def attempt(stream):
        with pytest.raises(InputError, match=name):
            weights.write_weights(tmp_path / "out", config, stream, {}, {})
        assert list(tmp_path.iterdir()) == []

    attempt((k, v) for k, v in leaves.items() if k != name)
    attempt((k, v[:1] if k == name else v) for k, v in leaves.items())
    attempt([(name, leaves[name]), (name, leaves[name])])
    attempt([(name + "s", leaves[name])])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    config, params = random_weights("tiny")

    def stream():
        yield next(leaves_of(params, config))
        raise error

    with pytest.raises(error):
        weights.write_weights(tmp_path / "out", config, stream(), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_existing_output_and_leftovers(written, tmp_path, capsys):
    with pytest.raises(InputError, match="exists already"):
        write(written[0])
    leftover = tmp_path / ".out.partial"
    (leftover / "params").mkdir(parents=True)
    (tmp_path / "out").mkdir()  # empty: not in the way
    write(tmp_path / "out", "tiny")
    assert str(leftover) in capsys.readouterr().err and not leftover.exists()


def test_no_flipped_bit_goes_unseen(tmp_path):
    """Each of 200 flips is an error that names the tensor or file, or changes nothing that is read."""
    config, copy = PRESETS["tiny"].replace(num_layers=1, hidden_size=32, intermediate_size=48), tmp_path / "model"
    rng = np.random.default_rng(0)
    leaves = {name: rng.standard_normal(p.shape, np.float32) for name, (p, _) in parameters.leaves(config).items()}
    weights.write_weights(copy, config, leaves.items(), TOKENIZER, {"source": "a test"})
    chooser = random.Random(0)
    paths = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in paths]
    small = [path for path in paths if "/d/" not in str(path)]
    names = [*leaves, *(path.name for path in small), "manifest"]
    noticed = 0
    for trial in range(200):
        path = chooser.choice(small) if trial % 3 == 0 else chooser.choices(paths, sizes)[0]
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[chooser.randrange(len(flipped))] ^= 1 << chooser.randrange(8)
        path.write_bytes(flipped)
        try:
            model = weights.load_checkpoint(copy)
        except InputError as error:
            assert any(name in str(error) for name in names), error
            assert trial % 10 or weights.verify(copy)
            noticed += 1
        else:
            found = parameters.unstack(model.params, config)
            assert bits_equal(found, leaves) and model.config == config and model.tokenizer.files == TOKENIZER
        path.write_bytes(original)
    assert noticed >= 150
    assert weights.verify(copy) == []


def test_a_wrong_tensor_is_named(copy):
    """A change that the storage cannot notice: the tensor is written anew."""
    entry = files.read_digests(copy).tensors["params"]["layers.001.key"]
    spec = {"driver": "zarr", "kvstore": files._kvstore(copy / "params", "layers.001.key")}
    store = ts.open(spec, open=True).result()
    changed = np.asarray(store.read().result()).copy()
    changed[3, 1, 2] += 1
    store.write(changed).result()
    message = r'tensor "layers.001.key" is damaged \(digest [0-9a-f]{16} expected ' + entry.digest
    with pytest.raises(InputError, match=message):
        weights.load_params(copy)
    config = PRESETS["tiny_moe"]
    mesh = sharding.make_mesh(data=1, fsdp=8)
    shardings = sharding.shardings(parameters.abstract(config), parameters.logical_axes(config), mesh)
    with pytest.raises(InputError, match=message):
        weights.load_params(copy, shardings=shardings)
    assert len(weights.verify(copy)) == 1


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_truncated_and_missing_files(written, tmp_path, harm):
    relative = sorted(p.relative_to(written[0]) for p in written[0].rglob("*") if p.is_file())
    data = [path for path in relative if "d" in path.parts]
    chosen = [path for path in relative if "d" not in path.parts] + random.Random(1).sample(data, 3)
    for number, path in enumerate(chosen):
        copy = tmp_path / str(number)
        shutil.copytree(written[0], copy)
        victim = copy / path
        if harm == "delete":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        try:
            model = weights.load_checkpoint(copy)
        except InputError as error:
            assert str(copy) in str(error)
        else:
            assert bits_equal(model.params, written[2])
            assert "d" in path.parts or path.name == "_METADATA", path  # superseded nodes of the database; Orbax's own
        shutil.rmtree(copy)


def make_workdir(source: Path, workdir: Path, numbers) -> Path:
    for number in numbers:
        shutil.copytree(source, workdir / "checkpoints" / str(number))
    return workdir


def damage_tensor(directory: Path) -> None:
    largest = max((directory / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)


def test_resolve_passes_over_damaged_and_incomplete_steps(written, tmp_path, capsys):
    run = make_workdir(written[0], tmp_path / "run", (5, 10, 90, 100))
    steps = run / "checkpoints"
    (steps / "100" / "digests.json").unlink()
    damage_tensor(steps / "90")
    for path in (run, steps):
        assert Path(weights.resolve(path)) == steps / "10"
        assert bits_equal(weights.load_checkpoint(path).params, written[2])
    assert "skipping step 90" in capsys.readouterr().err
    assert Path(weights.resolve(steps / "5")) == steps / "5"
    assert weights.steps(steps) == [5, 10, 90]
    with pytest.raises(InputError, match="damaged"):
        weights.resolve(steps / "90")
    with pytest.raises(InputError, match=r"digests\.json"):
        weights.resolve(steps / "100")
    for number in (5, 10):
        damage_tensor(steps / str(number))
    with pytest.raises(InputError, match="none of its 3 steps"):
        weights.load_params(run)


def test_missing_paths(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        weights.resolve(tmp_path / "nothing")
    with pytest.raises(InputError, match="neither a complete checkpoint"):
        weights.load_checkpoint(tmp_path)


def test_a_changed_config_digit_is_noticed(copy):
    path = copy / "config.json"
    values = json.loads(path.read_text())
    values["model"]["rope_theta"] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        weights.read_config(copy)


def test_verify_command(copy):
    command = ["tools/verify_checkpoint.py", f"--checkpoint={copy}"]
    done = command_lines.run(command)
    assert (done.returncode, done.stdout[:14]) == (0, "ok: 46 tensors"), done
    damage_tensor(copy)
    done = command_lines.run(command)
    assert done.returncode == 2 and "is damaged" in done.stdout
