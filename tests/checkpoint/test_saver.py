import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llada_jax import sharding
from llada_jax.checkpoint import files, saver, weights
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS
from tests.helpers.command_lines import Process
from tests.helpers.environment import process_environment
from tests.helpers.processes import free_port

CONFIG = PRESETS["tiny_moe"].replace(vocab_size=64, mask_token_id=63, eos_token_id=62, pad_token_id=62)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, expert=2)


@pytest.fixture(scope="module")
def state(mesh):
    """(params, optimizer, their shardings, their abstract values): sharded, with every kind of odd float."""
    abstract = parameters.abstract(CONFIG)
    shardings = sharding.shardings(abstract, parameters.logical_axes(CONFIG), mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract_optimizer = jax.eval_shape(OPTIMIZER.init, abstract)
    by_shape = {(leaf.shape): s for leaf, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)}
    optimizer_shardings = jax.tree.map(lambda leaf: by_shape.get(leaf.shape, replicated), abstract_optimizer)
    rng = np.random.default_rng(0)

    def odd(leaf, s):
        bits = rng.integers(0, 256, (*leaf.shape, leaf.dtype.itemsize), dtype=np.uint8)  # NaN payloads, subnormals
        return jax.device_put(bits.view(leaf.dtype).reshape(leaf.shape), s)

    params = jax.tree.map(odd, abstract, shardings)
    optimizer = jax.tree.map(odd, abstract_optimizer, optimizer_shardings)
    return params, optimizer, (shardings, optimizer_shardings), (abstract, abstract_optimizer)


@pytest.fixture(scope="module")
def little():
    """A state for tests of which steps are kept: on the host, and of weights alone."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), parameters.abstract(CONFIG)), optax.EmptyState()


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def save(writer, step, state, host=None):
    writer.save(step, state[0], state[1], {"step": step} if host is None else host, CONFIG, {}, {"made by": "a test"})


def restore(directory, state, config=CONFIG):
    return saver.restore(directory, config, *state[3], state[2])


def test_restore_gives_the_bits_that_were_saved(state, tmp_path):
    writer = saver.Saver(tmp_path / "checkpoints")
    save(writer, 7, state, {"data_offset": 12, "note": "x"})
    writer.wait()
    step, params, optimizer, host = restore(tmp_path / "checkpoints", state)
    assert (step, host) == (7, {"data_offset": 12, "note": "x"})
    assert bits(params) == bits(state[0]) and bits(optimizer) == bits(state[1])
    assert jax.tree.structure(optimizer) == jax.tree.structure(state[1])
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, (params, optimizer), state[2]))
    assert weights.verify(tmp_path / "checkpoints" / "7") == []
    loaded = weights.load_checkpoint(tmp_path)  # a workdir is a weights checkpoint too
    assert bits(loaded.params) == bits(state[0]) and loaded.lineage == {"made by": "a test"}
    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoints" / "7" / "params")
    assert set(plain) == set(parameters.leaves(CONFIG))


def test_restore_on_another_mesh_and_without_one(state, tmp_path):
    writer = saver.Saver(tmp_path)
    save(writer, 1, state)
    writer.wait()
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    other = jax.sharding.NamedSharding(sharding.make_mesh(data=8), jax.sharding.PartitionSpec())
    for layout in (single, other):
        everywhere = jax.tree.map(lambda _, layout=layout: layout, state[3])
        _, params, optimizer, _ = saver.restore(tmp_path, CONFIG, *state[3], everywhere)
        assert bits(params) == bits(state[0]) and bits(optimizer) == bits(state[1])


def test_donating_what_is_being_saved_is_safe(state, tmp_path):
    writer = saver.Saver(tmp_path)
    params, optimizer = jax.tree.map(jnp.copy, state[:2])
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    writer.save(1, params, optimizer, {}, CONFIG, {}, {})
    jax.block_until_ready(scramble((params, optimizer)))
    writer.wait()
    assert weights.verify(tmp_path / "1") == []
    assert bits(restore(tmp_path, state)[1:3]) == bits(state[:2])


def test_keeps_the_last(little, tmp_path):
    (tmp_path / ".3.partial.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    writer = saver.Saver(tmp_path, keep_last=2)
    for step in (1, 2, 10):
        save(writer, step, little)
    writer.wait()
    assert saver.steps(tmp_path) == [2, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2", "notes"]
    with pytest.raises(InputError, match="saved already"):
        save(writer, 10, little)


@pytest.mark.parametrize("keep_last,steps", [(1, [2, 4, 7]), (2, [2, 4, 6, 7]), (0, [1, 2, 3, 4, 5, 6, 7])])
def test_keeps_the_best(little, tmp_path, keep_last, steps):
    found = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 2.5, 7: 2.0}
    for step, score in found.items():
        writer = saver.Saver(tmp_path, keep_last, keep_best=2)  # a new one each time: the ranking is on disk
        writer.save(step, little[0], little[1], {}, CONFIG, {}, {}, score)
        writer.wait()
    assert saver.steps(tmp_path) == steps
    assert list(saver.scores(tmp_path))[:2] == [2, 4]  # of equal ones the older is the better


def test_ranks_only_what_was_scored_alike(little, tmp_path, capsys):
    for step, score, size in ((1, 0.5, 4), (2, 3.0, 32), (3, 2.0, 32), (4, 4.0, 32)):
        writer = saver.Saver(tmp_path, keep_last=1, keep_best=1, scored_by={"block_size": size})
        writer.save(step, little[0], little[1], {}, CONFIG, {}, {}, score)
        writer.wait()
    assert saver.steps(tmp_path) == [3, 4]
    assert "step 1 is not ranked with the others: scored by block_size=4, not 32\n" in capsys.readouterr().out
    assert saver.scores(tmp_path)[3] == saver.Score(2.0, {"block_size": 32})


def test_keeps_every_so_many(little, tmp_path):
    for step in (1, 2, 3, 4, 6, 7):
        writer = saver.Saver(tmp_path, keep_last=1, keep_every=3)
        save(writer, step, little)
        writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]


def test_damaged_steps_are_set_aside(state, tmp_path, capsys):
    writer = saver.Saver(tmp_path)
    for step in (1, 2, 3, 4):
        save(writer, step, state)
    writer.wait()
    (tmp_path / "4" / "digests.json").unlink()
    path = tmp_path / "3" / "train_state.json"
    path.write_text(path.read_text().replace("3", "8", 1))
    largest = max((tmp_path / "2" / "optimizer").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert restore(tmp_path, state)[0] == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1", "2.damaged", "3.damaged", "4"]
    printed = capsys.readouterr().out
    assert "train_state.json is damaged" in printed and 'tensor "optimizer/' in printed
    save(writer, 4, state)  # takes the place of the incomplete one
    writer.wait()
    assert restore(tmp_path, state)[0] == 4
    for step in (1, 4):
        (tmp_path / str(step) / "config.json").unlink()
    with pytest.raises(InputError, match="none of its 2 steps"):
        restore(tmp_path, state)


def test_relative_directory(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = saver.Saver("run/checkpoints")
    save(writer, 1, state)
    writer.wait()
    assert restore("run/checkpoints", state)[0] == 1
    assert bits(weights.load_params("run")) == bits(state[0])


def test_nothing_to_restore(state, tmp_path):
    assert restore(tmp_path / "checkpoints", state) is None


def test_errors_of_the_background_surface_once(state, tmp_path, monkeypatch):
    writer = saver.Saver(tmp_path)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files, "finish", full)
        save(writer, 1, state)
        with pytest.raises(OSError, match="no space left"):
            writer.wait()
        save(writer, 2, state)
        with pytest.raises(OSError, match="no space left"):
            save(writer, 3, state)
    assert saver.steps(tmp_path) == []
    save(writer, 3, state)
    writer.wait()
    assert saver.steps(tmp_path) == [3]


def test_another_model_or_optimizer_is_refused(state, tmp_path):
    writer = saver.Saver(tmp_path)
    save(writer, 1, state)
    writer.wait()
    with pytest.raises(InputError, match="rope_theta"):
        restore(tmp_path, state, CONFIG.replace(rope_theta=7.0))
    _, _, shardings, (abstract, abstract_optimizer) = state
    for other in (optax.sgd(0.1, momentum=0.9), optax.adamw(1e-3)):
        abstract_other = jax.eval_shape(other.init, abstract)
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract_other)
        with pytest.raises(InputError, match="optimizer do not match"):
            saver.restore(tmp_path, CONFIG, abstract, abstract_other, (shardings[0], places))
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float16), abstract)
    with pytest.raises(InputError, match="this run has float16"):
        saver.restore(tmp_path, CONFIG, wider, abstract_optimizer, shardings)
    assert saver.steps(tmp_path) == [1]  # not damaged


def test_optimizer_without_arrays_and_numpy_leaves(state, tmp_path):
    writer = saver.Saver(tmp_path)
    writer.save(1, state[0], optax.EmptyState(), {}, CONFIG, {}, {})
    writer.save(2, state[0], {"a": np.arange(3), "b": (None, np.float32(2))}, {}, CONFIG, {}, {})
    writer.wait()
    assert weights.verify(tmp_path / "1") == weights.verify(tmp_path / "2") == []
    (tmp_path / "2" / "digests.json").unlink()
    restored = saver.restore(tmp_path, CONFIG, state[3][0], optax.EmptyState(), (state[2][0], optax.EmptyState()))
    assert restored[2] == optax.EmptyState()


TWO_PROCESSES = """
    import sys, jax, numpy as np
    jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
    from llada_jax import sharding
    from llada_jax.model import parameters
    from llada_jax.model.config import PRESETS
    from llada_jax.checkpoint import saver
    config = PRESETS["tiny"].replace(num_layers=2)
    mesh = sharding.make_mesh(data=2, fsdp=2)
    abstract = parameters.abstract(config)
    shardings = sharding.shardings(abstract, parameters.logical_axes(config), mesh)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)
    params = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), values, shardings)
    writer = saver.Saver("{directory}", keep_last=2)
    for step in (1, 2, 3):
        writer.save(step, params, {{"mu": params}}, {{"step": step}}, config, {{}}, {{}})
    writer.wait()
    assert saver.steps("{directory}") == [2, 3]
    if jax.process_index() == 0:
        path = "{directory}/3/config.json"
        data = open(path).read()
        open(path, "w").write(data.replace("llama", "llamb"))
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("damaged")
    step, restored, optimizer, host = saver.restore(
        "{directory}", config, abstract, {{"mu": abstract}}, (shardings, {{"mu": shardings}}))
    assert (step, host) == (2, {{"step": 2}})
    for a, b in zip(jax.tree.leaves((restored, optimizer["mu"])), jax.tree.leaves((params, params)), strict=True):
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.array_equal(x.data, y.data)
    print("good")
"""


def test_two_processes(tmp_path):
    code = textwrap.dedent(TWO_PROCESSES.format(port=free_port(), directory=tmp_path))
    env = process_environment(devices=2)
    outs = [tmp_path / f"{rank}.out" for rank in range(2)]
    processes = [Process(["-c", code, rank], env, out, out) for rank, out in enumerate(outs)]
    assert [process.wait() for process in processes] == [0, 0], "\n".join(out.read_text() for out in outs)
    assert all("good" in out.read_text() for out in outs)
    assert weights.verify(tmp_path / "2") == []
    assert json.loads((tmp_path / "2" / "train_state.json").read_text()) == {
        "step": 2,
        "score": None,
        "host": {"step": 2},
    }
