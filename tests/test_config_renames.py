"""Fields that were renamed, or said "off" by zero: the old form has the old meaning, and one line says the new one."""

import json

import pytest
from absl import flags
from ml_collections import config_flags

from llada_jax import command_line, config_flag, config_renames
from llada_jax.checkpoint.score_file import ScoreFile
from llada_jax.config_fields import flat
from llada_jax.errors import InputError
from llada_jax.training import stages
from llada_jax.training.config import check, default_config, execution, objective, skips_steps, write
from tests.helpers.paths import ROOT

TINY = f"--config={ROOT / 'configs' / 'wsd.py'}:tiny"
OLD = {  # an old flag: (the field as it is now, its value)
    "execution.exchange=tokens": ("execution.expert_parallel", "gather_tokens"),
    "execution.exchange=weights": ("execution.expert_parallel", "gather_weights"),
    "objective.spread_times=true": ("objective.spread", True),
    "objective.spread_times=false": ("objective.spread", False),
    "yarn_factor=0": ("yarn_factor", None),
    "optimizer.learning_rate=0.0": ("optimizer.learning_rate", None),
    "checkpoint.every_minutes=0": ("checkpoint.every_minutes", None),
    "checkpoint.keep_last=0": ("checkpoint.keep_last", None),
    "checkpoint.keep_every=0": ("checkpoint.keep_every", None),
    "checkpoint.best_block_size=0": ("checkpoint.best_block_size", None),
    "faults.spike_factor=0.0": ("faults.spike_factor", None),
    "faults.hang_minutes=0": ("faults.hang_minutes", None),
}


@pytest.fixture(autouse=True)
def lines_anew():
    config_renames.announce.cache_clear()


def old_value(text: str):
    return {"true": True, "false": False}.get(text, float(text) if text[0].isdigit() else text)


def test_every_rename_is_tested_and_has_a_name_of_its_own():
    assert {flag.partition("=")[0] for flag in OLD} == {rename.old for rename in config_renames.RENAMES}
    names = [field.rpartition(".")[2] for field, _ in flat(default_config("tiny"))]
    for rename in config_renames.RENAMES:
        assert names.count(rename.new.rpartition(".")[2]) == 1
        assert names.count(rename.old.rpartition(".")[2]) == (rename.old == rename.new)


@pytest.mark.parametrize("flag", OLD)
def test_a_flag(flag, capsys):
    field, value = OLD[flag]
    config = config_flag.load([TINY, f"--config.{flag}"])
    actual = config_flag.field_of(config, field, "")
    assert actual == value and type(actual) is type(value)
    assert capsys.readouterr().err == f"--config.{flag} is now --config.{field}={value}\n"


@pytest.mark.parametrize("flag", OLD)
def test_a_config_file(flag, tmp_path, capsys):
    (field, value), (old, _, text) = OLD[flag], flag.partition("=")
    file = tmp_path / "config.py"
    file.write_text(
        "from llada_jax.training.stages import wsd\n\n\ndef get_config(argument=None):\n    config = wsd('tiny')\n"
        f"    config.{old} = {old_value(text)!r}\n    return config\n"
    )
    config = config_flag.load([f"--config={file}", "--config.seed=3"])
    actual = config_flag.field_of(config, field, "")
    assert actual == value and type(actual) is type(value)
    name, new = old.rpartition(".")[2], field.rpartition(".")[2]
    assert capsys.readouterr().err == f"config: {name}={old_value(text)!r} is now {new}={value!r}\n"
    if old != field:
        assert config[old] == old_value(text)  # read by its old name, it has its old value
    check(config)


def test_a_command_takes_an_old_flag(monkeypatch, capsys):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.setattr(command_line.flags, "FLAGS", values)
    monkeypatch.setattr(command_line.sys, "argv", ["train.py", TINY, "--config.execution.exchange=tokens"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda argv: 3 if holder.value.execution.expert_parallel == "gather_tokens" else 4)
    assert ended.value.code == 3
    line = "--config.execution.exchange=tokens is now --config.execution.expert_parallel=gather_tokens\n"
    assert capsys.readouterr().err == line


def test_a_negated_flag_and_update():
    config = config_flag.load([TINY, "--config.objective.spread_times", "--noconfig.objective.spread_times"])
    assert config.objective.spread is False
    config.objective.update(spread_times=True)
    config.checkpoint.update(every_steps=3, keep_last=0)
    config.execution["exchange"] = "tokens"
    assert objective(config).noise.spread and execution(config).expert_parallel == "gather_tokens"
    assert config.checkpoint.keep_last is None


def test_old_values_of_the_new_name_are_refused():
    with pytest.raises(InputError, match="expert_parallel='tokens', expected one of gather_weights, gather_tokens"):
        check(config_flag.load([TINY, "--config.execution.expert_parallel=tokens"]))
    with pytest.raises(InputError, match="expert_parallel='both', expected one of gather_weights, gather_tokens"):
        check(config_flag.load([TINY, "--config.execution.exchange=both"]))
    with pytest.raises(InputError, match="--config.objective.spread=2, expected true or false"):
        config_flag.load([TINY, "--config.objective.spread_times=2"])


def test_off_is_off():
    config = stages.wsd("tiny")
    config.faults.on_spike = "skip"
    assert not skips_steps(config)
    config.faults.spike_factor = 3
    assert skips_steps(config) and type(config.faults.spike_factor) is float
    config.faults.spike_factor = 0
    assert not skips_steps(config) and config.faults.spike_factor is None


def test_config_json_of_an_older_version_is_read_by_the_new_names(tmp_path, capsys):
    config = default_config("tiny")
    config.execution.expert_parallel = "gather_tokens"
    config.batch.rows = 4
    old = json.loads(config.to_json())
    del old["execution"]["expert_parallel"], old["objective"]["spread"]
    old["execution"]["exchange"], old["objective"]["spread_times"] = "tokens", False
    old["faults"]["spike_factor"] = old["checkpoint"]["every_minutes"] = old["yarn_factor"] = 0.0
    old["batch"]["rows"] = 8
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old))
    write(config, path)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: of an older version, read as ")
    for text in ("execution.expert_parallel='gather_tokens'", "faults.spike_factor=None", "objective.spread=False"):
        assert text in first
    assert others == ["config.batch.rows was 8, is now 4"]
    write(config, path)
    assert capsys.readouterr().out == "" and json.loads(path.read_text()) == json.loads(config.to_json())


def test_scores_of_an_older_version_stay(tmp_path):
    """The header of the file names the fields that the scores depend on."""
    path, shape = tmp_path / "scores.bin", (1,)
    ScoreFile(path, {"weights": "a", "config.objective.spread_times": True, "config.seed": 3}, shape, 2).append([1.0])
    now = {"weights": "a", "config.objective.spread": True, "config.seed": 3}
    again = ScoreFile(path, now, shape, 2)
    assert again.stored == 1
    again.append([2.0])
    assert ScoreFile(path, now, shape, 2).read().tolist() == [[1.0], [2.0]]
    with pytest.raises(InputError, match="scored with config.objective.spread=True, this run has False"):
        ScoreFile(path, now | {"config.objective.spread": False}, shape, 2)
