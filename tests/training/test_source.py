"""The checkpoint a run starts from: what is said of it, and the learning rate that it ended with."""

import json

import jax
import ml_dtypes
import pytest

from llada_jax.checkpoint import files, saver
from llada_jax.checkpoint.weights import write_weights
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.lora import Lora
from llada_jax.training.config import default_config
from llada_jax.training.source import continue_learning_rate, open_source

CONFIG = preset("tiny").replace(num_layers=1, hidden_size=16, intermediate_size=16)


def run_config(**changes):
    config = default_config("tiny")
    config.stage = "sft"
    config.schedule.update(kind="constant", steps=100)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=10, decay_steps=50, end_fraction=0.1)
    config.optimizer.update(changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Steps 5, 40, 75 and 100 of a run of 100."""
    folder = tmp_path_factory.mktemp("run")
    writer = saver.Saver(folder / "checkpoints")
    for step in (5, 40, 75, 100):
        params = parameters.initialize(CONFIG, jax.random.key(step))
        writer.save(step, params, {}, {}, CONFIG, {}, {"config": json.loads(run_config().to_json())})
    writer.wait()
    return folder


@pytest.mark.parametrize("step,rate", [(5, 1e-3), (40, 2e-3), (75, 2e-3 * (1 - 0.9 * 25 / 50)), (100, 2e-4)])
def test_the_rate_goes_on_where_the_step_before_ended(workdir, step, rate):
    source = open_source(workdir / "checkpoints" / str(step))
    config = continue_learning_rate(run_config(learning_rate=None), source)
    assert config.optimizer.learning_rate == pytest.approx(rate, rel=1e-5) and config.is_locked
    given = run_config()
    assert continue_learning_rate(given, source) is given


def test_a_workdir_stands_for_its_newest_step_and_digests_tell_weights_apart(workdir):
    newest, older = open_source(workdir), open_source(workdir / "checkpoints" / "40")
    assert newest.directory == workdir / "checkpoints" / "100" and newest.record()["step"] == 100
    assert "step 100 of stage sft" in newest.describe() and "float32" in newest.describe()
    assert newest.weights != older.weights and newest.weights == open_source(newest.directory).weights


def test_a_lora_step_is_the_merged_model(tmp_path):
    """The same A and B are other weights on another base or at another scale, and the same ones on a moved base."""
    leaves = parameters.unstack(parameters.initialize(CONFIG, jax.random.key(0)), CONFIG)
    first = next(iter(leaves))
    for name, scale in (("base", 1), ("moved", 1), ("other", 2)):
        changed = leaves | {first: scale * leaves[first]}
        stored = ((leaf, value.astype(ml_dtypes.bfloat16)) for leaf, value in changed.items())
        write_weights(tmp_path / name, CONFIG, stored, {}, {})
    sources = []
    for i, (name, alpha) in enumerate([("base", 2.0), ("moved", 2.0), ("other", 2.0), ("base", 4.0)]):
        identity = files.read_digests(tmp_path / name).sha256
        lora = Lora(CONFIG, 2, alpha, ("query",), str(tmp_path / name), identity)
        writer = saver.Saver(tmp_path / f"run-{i}" / "checkpoints")
        writer.save(1, parameters.initialize(lora, jax.random.key(1)), {}, {}, lora, {}, {})
        writer.wait()
        sources.append(open_source(tmp_path / f"run-{i}"))
    weights = [source.weights for source in sources]
    assert weights[0] == weights[1] and len(set(weights)) == 3
    assert (sources[0].dtype, sources[0].record()["parameters"]) == ("bfloat16", parameters.count(CONFIG))


@pytest.mark.parametrize(
    "lineage,said",
    [({"source": "/x/hf"}, "imported from /x/hf"), ({"merged": ["a", "b"]}, "the mean of 2 checkpoints")],
)
def test_checkpoints_that_no_run_wrote_have_no_rate(tmp_path, lineage, said):
    leaves = {
        name: p for name, p in parameters.unstack(parameters.initialize(CONFIG, jax.random.key(0)), CONFIG).items()
    }
    write_weights(tmp_path / "a", CONFIG, leaves.items(), {}, lineage)
    source = open_source(tmp_path / "a")
    assert source.step is None and said in source.describe()
    with pytest.raises(InputError, match="has no recorded schedule; set the rate"):
        continue_learning_rate(run_config(learning_rate=None), source)


def test_a_rate_that_ended_at_zero_is_refused(tmp_path):
    writer = saver.Saver(tmp_path / "checkpoints")
    config = run_config(decay_steps=0, learning_rate=None)
    params, recorded = parameters.initialize(CONFIG, jax.random.key(0)), json.loads(config.to_json())
    recorded["optimizer"]["learning_rate"] = 0.0
    writer.save(9, params, {}, {}, CONFIG, {}, {"config": recorded})
    writer.wait()
    with pytest.raises(InputError, match="ended at 0.0; set the rate"):
        continue_learning_rate(config, open_source(tmp_path))
