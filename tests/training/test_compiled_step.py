"""A compiled step that is saved, loaded by the trainer, and refused where it does not fit."""

import json

import jax
import jax.numpy as jnp
import pytest

from llada_jax import sharding
from llada_jax.errors import InputError
from llada_jax.model.config import preset
from llada_jax.pod.lower import without_cache
from llada_jax.training import compiled_step, stages
from llada_jax.training.loop import train


@pytest.fixture(autouse=True)
def compiled_here():
    """A program for CPUs that was itself loaded, as from JAX's cache, cannot be saved: what is loaded of it fails."""
    with without_cache():
        yield


def small(tmp_path, name):
    config = stages.wsd("tiny", length=64).unlock()
    config.data.cache = str(tmp_path / "data")
    config.schedule.kind, config.schedule.steps, config.schedule.block_size = "constant", 3, 32
    config.evaluation.block_sizes, config.evaluation.every_steps = (32,), 100
    config.checkpoint.every_steps, config.log_every_steps = 100, 1
    return config, tmp_path / name


def losses(workdir):
    rows = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_with_a_saved_step_is_the_run_without(tmp_path, monkeypatch):
    """The program is taken from the trainer itself, as the rehearsal takes it: lowered and compiled by itself."""
    config, plain = small(tmp_path, "plain")
    step_file, made = str(tmp_path / "step"), {}
    from llada_jax.training import supervised

    real = supervised.make_train_step

    def recording(model, *rest):
        step = real(model, *rest)

        def call(*arguments):
            if not made:
                mesh = jax.sharding.get_mesh()
                made.update(compiled_step.identity(config, model, mesh, arguments[-1]))
                compiled_step.save(step_file, step.lower(*arguments).compile(), made)
            return step(*arguments)

        return call

    monkeypatch.setattr(supervised, "make_train_step", recording)
    train(config, str(plain), devices=jax.devices()[:1])
    monkeypatch.setattr(supervised, "make_train_step", lambda *_: lambda *_: pytest.fail("the saved step was not used"))
    config.compiled_step = step_file
    train(config, str(tmp_path / "saved"), devices=jax.devices()[:1])
    assert losses(tmp_path / "saved") == losses(plain) and len(losses(plain)) == 3


def identity(config, devices=1):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return compiled_step.identity(config, preset("tiny"), mesh, "both")


@pytest.fixture
def saved(tmp_path):
    config, _ = small(tmp_path, "run")
    path = str(tmp_path / "step")
    compiled_step.save(path, jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(), identity(config))
    return config, path


def test_it_runs_what_it_was(saved):
    config, path = saved
    assert compiled_step.load(path, identity(config), jax.devices()[:1])(jnp.ones(3)).tolist() == [2, 2, 2]


def test_what_the_step_depends_on_is_refused_when_it_differs(saved):
    config, path = saved
    config.log_every_steps, config.init_from = 7, "elsewhere"  # of no consequence
    compiled_step.load(path, identity(config), jax.devices()[:1])
    config.optimizer.learning_rate *= 2
    with pytest.raises(InputError, match="compiled for config and model '.*', this run has"):
        compiled_step.load(path, identity(config), jax.devices()[:1])
    config.optimizer.learning_rate /= 2
    for section, values in (("editing", dict(weight=1.0, turns=2)), ("objective", dict(group_blocks=2))):
        other = config.copy_and_resolve_references()
        other[section].update(values)
        with pytest.raises(InputError, match="compiled for config and model '.*', this run has"):
            compiled_step.load(path, identity(other), jax.devices()[:1])
    with pytest.raises(InputError, match="compiled for devices '1 x cpu', this run has '2 x cpu'"):
        compiled_step.load(path, identity(config, devices=2), jax.devices()[:2])
    other_code = identity(config) | {"sources of llada_jax": "0123456789abcdef"}
    with pytest.raises(InputError, match="compiled for sources of llada_jax '.*', this run has '0123456789abcdef'"):
        compiled_step.load(path, other_code, jax.devices()[:1])
    with pytest.raises(InputError, match="compiled for JAX"):
        compiled_step.load(path, identity(config) | {"JAX": "0.0.1"}, jax.devices()[:1])


@pytest.mark.parametrize("content", [b"", b"not a step", None])
def test_a_file_that_is_no_step_is_refused(tmp_path, content):
    path = tmp_path / "step"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="not a compiled step"):
        compiled_step.load(str(path), {}, jax.devices()[:1])
