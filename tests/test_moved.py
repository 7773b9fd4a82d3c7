"""Old names of modules: the same module objects, with a line that says the new name."""

import importlib
import importlib.util
import subprocess
import sys
import warnings

import pytest

from llada_jax import _moved
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("old,new", _moved.MOVED.items())
def test_an_old_name_is_of_a_module_that_exists_and_hides_none(old, new):
    def file(name):
        return ROOT / "llada_jax" / (name.replace(".", "/") + ".py")

    assert file(new).exists() and not file(old).exists() and not file(old).with_suffix("").exists()
    assert importlib.util.find_spec(f"llada_jax.{old}") is not None
    assert new not in _moved.MOVED, "one step to the newest name"


@pytest.mark.parametrize(
    "line,new",
    [
        ("from llada_jax.training import checkpoint as module", "checkpoint.weights"),
        ("import llada_jax.training.merge as module", "checkpoint.merge"),
        ("from llada_jax.training import checkpoint_files as module", "checkpoint.files"),
        ("import llada_jax.interop.tokenizer as module", "tokenizer"),
        ("import llada_jax.pictures as module", "plots"),
    ],
)
def test_each_form_of_import_gives_the_module_of_the_new_name(line, new):
    module = importlib.import_module(f"llada_jax.{new}")
    spec, names = module.__spec__, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(line, names)
    assert names["module"] is module
    assert module.__spec__ is spec and module.__name__ == f"llada_jax.{new}"


def test_names_within_an_old_module():
    from llada_jax.checkpoint.weights import load_checkpoint as new
    from llada_jax.training.checkpoint import load_checkpoint as old

    assert old is new


def test_a_script_is_told_once_and_where(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from llada_jax.pod import chips\nimport llada_jax.pod.chips\nprint(chips.__name__)\n")
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.stdout == "llada_jax.chips\n"
    assert done.stderr.splitlines() == [
        f"{script}:1: DeprecationWarning: llada_jax.pod.chips is now llada_jax.chips",
        "  from llada_jax.pod import chips",
    ]


@pytest.mark.parametrize("name", ["llada_jax.training.nothing", "llada_jax.checkpoints", "training.checkpoint"])
def test_other_names_are_still_unknown(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
