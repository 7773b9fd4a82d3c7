"""The public names: all of them are there, imported when they are asked for, and their examples run."""

import ast
import doctest
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llada_jax
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.diffusion.objectives import Objective
from llada_jax.model import parameters
from llada_jax.model.forward import Execution
from llada_jax.training.step import denoising_loss
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: "checkpoint", a model with a tokenizer, and "hf", the same as of Hugging Face."""
    path = tmp_path_factory.mktemp("examples")
    config = llada_jax.preset("tiny")
    params = llada_jax.init(config, jax.random.key(0))
    llada_jax.save_params(
        path / "checkpoint", params, config, byte_tokenizer(config.eos_token_id, config.mask_token_id)
    )
    llada_jax.export_checkpoint(path / "checkpoint", path / "hf")
    (path / "configs").symlink_to(ROOT / "configs")
    return path


@pytest.mark.parametrize("name", llada_jax.__all__)
def test_every_public_name_has_an_example_that_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = getattr(llada_jax, name).__doc__
    example = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    assert example.examples, f"{name} has no example"
    out = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=out.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(out)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "llada_jax/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.asname: f"{node.module}.{alias.name}".removeprefix("llada_jax.")
        for node in block.body
        for alias in node.names
    }
    given = {
        name: place.rstrip(":").replace(":", ".") if ":" in place else f"{place}.{name}"
        for name, place in llada_jax._NAMES.items()
    }
    assert seen == given
    assert set(llada_jax.__all__) == set(seen) <= set(dir(llada_jax))
    assert all(name in llada_jax.__doc__ for name in seen)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        llada_jax.trian  # noqa: B018
    with pytest.raises(ImportError):
        from llada_jax import nothing  # noqa: F401


def test_importing_the_package_is_cheap():
    code = "import json, sys; import llada_jax, llada_jax.errors; dir(llada_jax); print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "llada_jax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "numpy", "absl", "orbax", "tensorstore", "etils", "ml_collections"}


def test_train_is_the_function_whoever_imports_the_command():
    code = """
import sys, llada_jax
from llada_jax.train import main
import llada_jax.train
from llada_jax import train
from llada_jax.training.loop import train as expected
assert train is llada_jax.train is expected and sys.modules["llada_jax.train"].main is main
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)


# ---- commands

_DRIVER = """
import json, os, runpy, sys
for line in sys.stdin:
    sys.stdout.flush()
    path, *arguments = json.loads(line)
    if not os.fork():
        sys.argv[:] = [path, *arguments]
        sys.path.insert(0, os.path.dirname(path))
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            print(json.dumps([path, sys.exc_info()[1].code, sorted(sys.modules)]))
    os.wait()
"""
COMMANDS = [
    str(path.relative_to(ROOT))
    for folder in ("llada_jax", "tools", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "\n    command_line.run(" in path.read_text()
]
CONFIGURED = [path for path in COMMANDS if "DEFINE_config_file" in (ROOT / path).read_text()]


SLOW = {"jax", "jaxlib", "flax", "orbax", "tensorstore", "grain", "array_record", "pyarrow", "transformers", "torch"}


def check_answers_without_jax(lines, message):
    """Each command line [path, argument, ...] ends with exit code 2 and the one message, and imports nothing slow."""
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500,
        input="".join(json.dumps(line) + "\n" for line in lines),
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(path, code) for path, code, _ in results] == [(path, 2) for path, *_ in lines], done.stderr
    assert [line.startswith(message) for line in done.stderr.splitlines()] == [True] * len(lines), done.stderr
    assert {path: found for path, _, modules in results if (found := sorted(SLOW & set(modules)))} == {}


def test_no_command_imports_jax_before_its_flags_are_right():
    assert {"llada_jax/train.py", "tools/generate.py", "tools/verify_checkpoint.py"} < set(COMMANDS)
    config = ["--config=configs/wsd.py:tiny", "--config.batch.rows=8"]
    lines = [[path, *config * (path in CONFIGURED), "--nosuchflag"] for path in COMMANDS]
    check_answers_without_jax(lines, "error: Unknown command line flag 'nosuchflag'")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=configs/wsd.py:tiny", "--config.batch.rwos=8"], "error: --config.batch.rwos: no such field"),
        (["--config=configs/sft.py:tinny"], "error: --config=configs/sft.py:tinny: config: unknown model 'tinny'"),
        (
            ["--config=configs/ar.py:tiny,step=8"],
            "error: --config=configs/ar.py:tiny,step=8: config argument: unknown option",
        ),
    ],
)
def test_nor_before_the_fields_of_its_config_are_there(arguments, message):
    assert "llada_jax/train.py" in CONFIGURED
    check_answers_without_jax([[path, *arguments] for path in CONFIGURED], message)


def test_lm_evals_own_flags_are_read_before_jax():
    command = [sys.executable, "-X", "importtime", "-m", "llada_jax.evaluation.lm_eval", "run", "--nosuchflag"]
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "unrecognized arguments: --nosuchflag" in done.stderr
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "lm_eval._cli" in modules and not {"jax", "torch", "transformers"} & modules


# ---- loss


@pytest.fixture(scope="module")
def rows():
    batch = llada_jax.make_batch(jax.random.randint(jax.random.key(1), (2, 32), 0, 256))
    return batch.replace(row_ids=np.array([7, 9], np.uint32), epochs=np.array([0, 2], np.uint32))


@pytest.mark.parametrize(
    "objective,block_size,halves", [(Objective(confidence_weight=0.5), 8, "both"), (Objective(), 1, "clean")]
)
def test_loss_is_the_trainers(rows, objective, block_size, halves):
    """With the key of the trainer's seed, but for the compiler's order of sums."""
    config = llada_jax.preset("tiny").replace(num_layers=1, alignment="shifted" if halves == "clean" else "same")
    params = llada_jax.init(config, jax.random.key(0))
    trainer = denoising_loss(config, objective, Execution(), seed=5)

    @jax.jit
    def expected(params, batch):
        example = trainer.prepare(batch, block_size, halves)
        return trainer.value(params, None, example, trainer.total(example), None, halves)[0]

    compute = functools.partial(llada_jax.loss, params, config, rows, block_size=block_size, objective=objective)
    found = compute(jax.random.key(5), halves=halves)
    assert found.dtype == jnp.float32 and found.shape == ()
    assert float(found) == pytest.approx(float(expected(params, rows)), rel=1e-5)
    if halves == "both":
        assert compute(jax.random.key(5)) == found
        assert float(compute(jax.random.key(6))) != pytest.approx(float(found), rel=1e-3)


def test_loss_without_a_block_size_is_of_one_block(rows, monkeypatch):
    seen = []
    monkeypatch.setattr("llada_jax.diffusion.loss._loss", lambda *arguments: seen.append(arguments))
    for choices in (dict(block_size=None), dict(block_size=32, halves="noisy")):
        llada_jax.loss({}, llada_jax.preset("tiny"), rows, None, **choices)
    assert seen[0] == seen[1] and seen[0][4:7] == (32, Objective(), "noisy")


def test_loss_refuses(rows):
    config = llada_jax.preset("tiny").replace(num_layers=1)
    with pytest.raises(llada_jax.InputError, match="halves='all', expected both, noisy or clean"):
        llada_jax.loss({}, config, rows, jax.random.key(0), block_size=8, halves="all")
    with pytest.raises(llada_jax.InputError, match="no mask token"):
        llada_jax.loss({}, config.replace(mask_token_id=None), rows, jax.random.key(0), block_size=8)


# ---- save_params, make_batch


def test_saved_weights_come_back(tmp_path):
    config, draws = llada_jax.preset("tiny_moe").replace(num_layers=2), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draws.random(leaf.shape).astype(jnp.bfloat16), parameters.abstract(config))
    llada_jax.save_params(tmp_path / "saved", params, config, lineage={"note": "by hand"})
    model = llada_jax.load_checkpoint(tmp_path / "saved")
    assert (model.config, model.tokenizer, model.lineage) == (config, None, {"note": "by hand"})
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}


def test_weights_of_another_tree_are_refused(tmp_path):
    config = llada_jax.preset("tiny").replace(num_layers=1)
    params = parameters.abstract(config)
    del params["final_norm"]
    with pytest.raises(llada_jax.InputError, match="params: final_norm is only in the model"):
        llada_jax.save_params(tmp_path / "saved", params, config)
    with pytest.raises(llada_jax.InputError, match="params: extra is only in the given tree"):
        llada_jax.save_params(tmp_path / "saved", params | {"final_norm": 0, "extra": 0}, config)
    assert not (tmp_path / "saved").exists()


def test_rows_of_tokens(rows):
    assert rows.supervised.all() and rows.segment_ids.dtype == rows.ids.dtype == "int32"
    padded = llada_jax.make_batch([[1, 2, 0]], [[1, 1, 0]], [[False, True, True]])
    assert padded.supervised.tolist() == [[False, True, False]], "padding is never scored"
    with pytest.raises(llada_jax.InputError, match=r"tokens has shape \(3,\)"):
        llada_jax.make_batch([1, 2, 3])
    with pytest.raises(llada_jax.InputError, match=r"supervised has shape \(1, 2\)"):
        llada_jax.make_batch([[1, 2, 3]], supervised=[[True, True]])
