"""Runs of reinforcement learning: what a step does, and that it is a function of (seed, step)."""

import json

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax.errors import InputError
from llada_jax.model.config import preset
from llada_jax.monitoring.metrics import TIMED
from llada_jax.training import loop, reinforcement, stages
from tests.helpers.rl_inputs import write_rl_inputs
from tests.training.test_loop import assert_same_checkpoint

MODEL = preset("tiny").replace(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16, intermediate_size=64
)
REWARDS = """
def early(question, answer):
    return sum(letter < "n" for letter in answer) / max(len(answer), 1)

def same(question, answer):
    return 1.0

def sometimes(question, answer):
    if len(answer) % 2:
        raise ValueError("odd")
    return early(question, answer)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: a checkpoint of random weights; questions.jsonl; rewards.py."""
    folder = tmp_path_factory.mktemp("rl")
    write_rl_inputs(folder, MODEL, REWARDS)
    return folder


def config_of(folder, **changes):
    config = stages.rl("init_from", length=32, steps=3)
    config.init_from = str(folder / "base")
    config.execution.update(dtype="float32", attention="dense", remat="none")
    config.schedule.block_size = 8
    config.batch.rows = 8
    config.rl.update(
        questions=str(folder / "questions.jsonl"), held_out=4, reward=f"{folder}/rewards.py:early", group=4,
        gen_length=12, rows=4, copies=2, reward_workers=1, answers_every_steps=2,
    )  # fmt: skip
    config.optimizer.learning_rate = 3e-3
    config.checkpoint.update(every_steps=1, keep_last=None)
    config.evaluation.update(every_steps=3, block_sizes=(8,))
    for field, value in changes.items():
        section, _, name = field.rpartition("__")
        node = config[section] if section else config
        node[name] = value
    return config


def train(config, workdir, devices=1) -> list[dict]:
    loop.train(config, str(workdir), jax.devices()[:devices])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """{estimator: (workdir, metrics) of a run that nothing has cut}"""
    runs = {}
    for estimator in ("elbo", "trajectory"):
        workdir = tmp_path_factory.mktemp(estimator) / "run"
        runs[estimator] = workdir, train(config_of(folder, rl__estimator=estimator), workdir)
    return runs


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_a_run_updates_the_weights_by_the_rewards(whole, folder, estimator):
    workdir, rows = whole[estimator]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["ratio"] == 1 and row["clip_share"] == 0  # one update from the policy that has answered
        assert row["drift_max"] < 1e-4
        assert 0 < row["reward"] < 1 and row["gradient_norm"] > 0 and row["groups_without_signal"] < 1
        assert row["tokens_per_forward"] > 0 and row["entropy"] > 0 and row["reward_faults"] == 0
    assert [(row["step"], row["score"]) for row in rows if "score" in row] == [(0, 0), (3, 0)]
    trained, base = (llada_jax.load_checkpoint(path).params["embedding"] for path in (workdir, folder / "base"))
    assert np.abs(trained - base).max() > 1e-4
    answers = [json.loads(line) for line in (workdir / reinforcement.ANSWERS).read_text().splitlines()]
    assert [answer["step"] for answer in answers] == [1] * 4 + [3] * 4
    assert len({answer["question"] for answer in answers[:4]}) == 1


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_rewards_rise(folder, tmp_path, estimator):
    """From 0.44, the share of early letters in what random weights write, by a quarter of the way to 1 at least."""
    config = config_of(
        folder, rl__estimator=estimator, schedule__steps=10, batch__rows=32, rl__rows=32, rl__group=8,
        rl__drift_rows=0, checkpoint__every_steps=10, evaluation__every_steps=10,
    )  # fmt: skip
    rewards = [row["reward"] for row in train(config, tmp_path / "run") if "reward" in row]
    assert np.mean(rewards[:3]) < 0.5 and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.14


@pytest.mark.parametrize(
    "estimator, where",
    [
        ("elbo", "update"), ("trajectory", "rollout"),
        pytest.param("elbo", "rollout", marks=pytest.mark.soak),
        pytest.param("trajectory", "update", marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_run_that_is_killed_in_a_step_ends_as_if_it_was_not(whole, folder, tmp_path, monkeypatch, estimator, where):
    config = config_of(folder, rl__estimator=estimator, checkpoint__every_steps=2)
    seen = []

    def dying(real, at):
        def call(*arguments, **more):
            seen.append(1)
            if len(seen) == at:
                raise KeyboardInterrupt
            return real(*arguments, **more)

        return call

    with monkeypatch.context() as patched:
        if where == "rollout":
            patched.setattr(reinforcement, "sample", dying(reinforcement.sample, 3))
        else:
            real = reinforcement.programs

            def programs(*arguments):
                made = real(*arguments)
                return made._replace(update=dying(made.update, 3))

            patched.setattr(reinforcement, "programs", programs)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    last = [path / "checkpoints" / "3" for path in (tmp_path / "cut", whole[estimator][0])]
    assert_same_checkpoint(*last)
    texts = [(run / reinforcement.ANSWERS).read_text() for run in (tmp_path / "cut", whole[estimator][0])]
    assert texts[0] == texts[1]


def test_sigterm_in_a_rollout_saves_the_steps_before_it(whole, folder, tmp_path, monkeypatch, capsys):
    config = config_of(folder, checkpoint__every_steps=3)
    real, calls = reinforcement.sample, []

    def stopping(*arguments):
        calls.append(1)
        return None if len(calls) == 3 else real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(reinforcement, "sample", stopping)
        loop.train(config, str(tmp_path / "cut"), jax.devices()[:1])
    assert "stopped at step 2" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["2"]
    rows = train(config, tmp_path / "cut")
    assert rows == whole["elbo"][1]
    assert_same_checkpoint(tmp_path / "cut" / "checkpoints" / "3", whole["elbo"][0] / "checkpoints" / "3")


def test_rewards_without_signal_change_nothing(folder, tmp_path):
    config = config_of(folder, rl__reward=f"{folder}/rewards.py:same", optimizer__weight_decay=0.0, rl__per_token=True)
    rows = [row for row in train(config, tmp_path / "run") if "loss" in row]
    assert all(row["gradient_norm"] == 0 and row["groups_without_signal"] == 1 and row["reward"] == 1 for row in rows)
    trained, base = (llada_jax.load_checkpoint(path).params for path in (tmp_path / "run", folder / "base"))
    jax.tree.map(np.testing.assert_array_equal, trained, base)


def test_rewards_that_fail_are_counted_and_told(folder, tmp_path, capsys):
    config = config_of(folder, rl__reward=f"{folder}/rewards.py:sometimes", schedule__steps=1)
    (row,) = (row for row in train(config, tmp_path / "run") if "loss" in row)
    out = capsys.readouterr().out
    assert 0 < row["reward_faults"] < 8 and "step 1  reward: question" in out and "odd" in out


def test_several_updates_reference_and_adapters(folder, tmp_path):
    """Off the answers' policy the ratio leaves 1; against init_from the KL leaves 0; adapters end as any others do."""
    config = config_of(
        folder, rl__updates=2, rl__epochs=2, rl__kl_weight=0.1, lora__rank=4, optimizer__learning_rate=0.03,
        rl__estimator="trajectory", rl__rule="entropy", rl__temperature=0.7, rl__token_weights="step",
    )  # fmt: skip
    with config.unlocked():
        config.lora.targets = ("query", "up")
    rows = [row for row in train(config, tmp_path / "run") if "loss" in row]
    assert rows[0]["log_ratio_variance"] > 0 and rows[1]["kl"] > 0
    assert all(row["drift_max"] < 1e-4 for row in rows)
    model = llada_jax.load_checkpoint(tmp_path / "run")
    assert model.config.vocab_size == MODEL.vocab_size


def test_a_run_goes_on_with_the_reference_that_it_began_with(whole, folder, tmp_path):
    config = config_of(folder, rl__kl_weight=0.1, schedule__steps=1)
    train(config, tmp_path / "run")
    config.init_from, config.schedule.steps = str(whole["elbo"][0]), 2
    with pytest.raises(InputError, match="but the reference of"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("estimator", ["elbo", pytest.param("trajectory", marks=pytest.mark.soak)])
def test_a_mesh_trains_as_one_device_does(whole, folder, tmp_path, estimator):
    config = config_of(folder, rl__estimator=estimator)
    config.mesh.fsdp, config.mesh.data = 2, 2
    one, four = whole[estimator][1], train(config, tmp_path / "run", devices=4)
    for a, b in zip(one, four, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name not in ("drift", "drift_max") and isinstance(a[name], float):
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), (a["step"], name)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"init_from": ""}, 'config.init_from=""'),
        ({"rl__questions": ""}, 'config.rl.questions=""'),
        ({"rl__questions": "reasoning_gym:no_such_task"}, "no_such_task"),
        ({"rl__questions": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"rl__settings": "{"}, "config.rl.settings='{'"),
        ({"rl__settings": "[1]"}, "config.rl.settings='[1]'"),
        ({"rl__reward": "nowhere.py:reward"}, "nowhere.py"),
        ({"rl__group": 3}, "config.rl.group=3 does not divide batch.rows=8"),
        ({"rl__group": 1}, "config.rl.group=1"),
        ({"rl__updates": 3}, "config.rl.updates=3 does not divide batch.rows=8"),
        ({"batch__micro_batches": 3}, "config.batch.micro_batches=3"),
        ({"schedule__block_size": 5}, "block size 5 does not divide length 32"),
        ({"rl__temperature": 0.0}, "config.rl.temperature=0.0"),
        ({"rl__rule": "best"}, "config.rl.rule='best'"),
        ({"rl__rule": "llada2.1", "rl__estimator": "trajectory"}, "config.rl.rule='llada2.1'"),
        ({"rl__clip_low": 1.0}, "config.rl.clip_low=1.0"),
        ({"rl__estimator": "ppo"}, "config.rl.estimator='ppo'"),
        ({"objective__complementary": True}, "config.objective.complementary=True: not in a run of reinforcement"),
        ({"data__path": "rows"}, "config.data.path='rows'"),
        ({"checkpoint__keep_best": 2}, "config.checkpoint.keep_best=2"),
        ({"faults__on_nonfinite": "skip"}, "config.faults.on_nonfinite='skip'"),
        ({"schedule__kind": "wsd"}, "config.schedule.kind='wsd'"),
        ({"rl__gen_length": 30}, "do not fit in config.data.length=32"),
    ],
)
def test_bad_settings_end_in_one_line(folder, tmp_path, changes, says):
    with pytest.raises(InputError) as error:
        train(config_of(folder, **changes), tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
