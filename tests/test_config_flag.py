"""The --config flags: what they read, and the one line that bad ones give."""

from pathlib import Path

import pytest
from absl import flags

from llada_jax import command_line, config_flag
from llada_jax.errors import InputError

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'configs' / 'wsd.py'}:tiny"


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        config_flag.load([TINY, *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD = {
    "evaluation.block_sizes=1,4,full": "--config.evaluation.block_sizes=1,4,full: 'full', expected an integer",
    "evaluation.block_sizes=": "--config.evaluation.block_sizes=, expected values with commas between them, or ()",
    "evaluation.block_sizes=None": "--config.evaluation.block_sizes=None: None, expected an integer",
    "evaluation.block_sizes=('4',)": "--config.evaluation.block_sizes=('4',): '4', expected an integer",
    "evaluation.block_sizes=(1,4": "--config.evaluation.block_sizes=(1,4, expected values with commas",
    "schedule.decay_steps=(1,2.0)": "--config.schedule.decay_steps=(1,2.0): 2.0, expected an integer",
    "schedule.decay_steps=True": "--config.schedule.decay_steps=True: True, expected an integer",
    "schedule.decay_steps=(1,,2)": "--config.schedule.decay_steps=(1,,2), expected values",
    "schedule.decay_steps={1: 2}": "expected an integer",
    "lora.targets=None": "--config.lora.targets=None: None, expected text",
    "lora.targets=('query',3)": "3, expected text",
    "batch.rows=2.0": "--config.batch.rows=2.0, expected an integer",
    "batch.rows=": "--config.batch.rows=, expected an integer",
    "batch.rows=None": "--config.batch.rows=None, expected an integer",
    "schedule.steps=1e3": "--config.schedule.steps=1e3, expected an integer",
    "optimizer.learning_rate=fast": "--config.optimizer.learning_rate=fast, expected a number",
    "optimizer.learning_rate=nan": "--config.optimizer.learning_rate=nan, expected a number",
    "optimizer.b1=None": "--config.optimizer.b1=None, expected a number",
    "faults.spike_factor=far": "--config.faults.spike_factor=far, expected a number or None",
    "faults.hang_minutes=inf": "--config.faults.hang_minutes=inf, expected a number or None",
    "checkpoint.keep_last=1.5": "--config.checkpoint.keep_last=1.5, expected an integer or None",
    "checkpoint.keep_last=none": "--config.checkpoint.keep_last=none, expected an integer or None",
    "checkpoint.keep_last": "--config.checkpoint.keep_last: expected a value",
    "objective.complementary=2": "--config.objective.complementary=2, expected true or false",
    "objective.complementary=": "--config.objective.complementary=, expected true or false",
    "data.source=None": '--config.data.source=None, expected text ("" is none)',
    "batch=4": "--config.batch: config.batch is a section; set its fields, micro_batches, rows",
    "batch.rows.each=4": "--config.batch.rows.each: config.batch.rows is a value, it has no fields",
    "optimizer.lr=1e-3": "no such field, config.optimizer.lr; config.optimizer has b1, b2, clip_norm",
    "optimizer.warmup=3": "did you mean config.optimizer.warmup_steps? config.optimizer has b1, b2,",
    "learning_rate=1e-3": "no such field, config.learning_rate; did you mean config.optimizer.learning_rate?",
    "zzz=1": "no such field, config.zzz; config has alignment, batch,",
    "data.path": "--config.data.path: expected a value, --config.data.path=VALUE",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_values_name_flag_and_value(flag):
    assert BAD[flag] in refusal(f"--config.{flag}")


@pytest.mark.parametrize(
    "flags, field, value",
    [
        (["--config.evaluation.block_sizes=1,4"], "evaluation.block_sizes", (1, 4)),
        (["--config.evaluation.block_sizes=[1, 4]"], "evaluation.block_sizes", (1, 4)),
        (["--config.evaluation.block_sizes=4"], "evaluation.block_sizes", (4,)),
        (["--config.evaluation.block_sizes", "(1,4)"], "evaluation.block_sizes", (1, 4)),
        (["--config.evaluation.block_sizes=1", "--config.evaluation.block_sizes=4"], "evaluation.block_sizes", (1, 4)),
        (["--config.lora.targets=query,value"], "lora.targets", ("query", "value")),
        (["--config.lora.targets=(query, value)"], "lora.targets", ("query", "value")),
        (["--config.data.patterns=*.py,*.md"], "data.patterns", ("*.py", "*.md")),
        (["--config.data.patterns=('a,b',)"], "data.patterns", ("a,b",)),
        (["--config.data.patterns=()"], "data.patterns", ()),
        (["--config.data.mixture=A:0.7,B:0.3"], "data.mixture", "A:0.7,B:0.3"),
        (["--config.stage="], "stage", ""),
        (["--config.stage=x=1, 'y'"], "stage", "x=1, 'y'"),
        (["--config.mesh.data", "-1"], "mesh.data", -1),
        (["--config.optimizer.clip_norm=inf"], "optimizer.clip_norm", float("inf")),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.optimizer.learning_rate=None"], "optimizer.learning_rate", None),
        (["--config.checkpoint.keep_last", "None"], "checkpoint.keep_last", None),
        (["--config.checkpoint.keep_last=3"], "checkpoint.keep_last", 3),
        (["--config.faults.spike_factor=3"], "faults.spike_factor", 3.0),
        (["--config.yarn_factor=2"], "yarn_factor", 2.0),
        (["--config.objective.complementary"], "objective.complementary", True),
        (["--noconfig.objective.document_mask"], "objective.document_mask", False),
        (["--config.objective.complementary=TRUE", "--config.seed=3"], "objective.complementary", True),
    ],
)
def test_good_values(flags, field, value):
    config = config_flag.load([TINY, *flags])
    actual = config_flag.field_of(config, field, "")
    assert actual == value and type(actual) is type(value)


FILES = {
    "raise KeyError('width')": "config.py:2: KeyError: 'width'",
    "import nothing_of_the_name": "config.py:2: ModuleNotFoundError: No module named 'nothing_of_the_name'",
    "return {'seed': 1}": "get_config gives a dict, expected a ConfigDict",
    "return (": "config.py:2: '(' was never closed",
    "from llada_jax.training.config import default_config; c = default_config('tiny'); c.batch.row = 3; return c": (
        "config.py:2: AttributeError"
    ),
    "from llada_jax.training.config import default_config; c = default_config('tiny'); c.batch.rows = 'x'; return c": (
        "config.py:2: TypeError"
    ),
    "from llada_jax.training.config import default_config; return default_config('qwen')": "unknown model 'qwen'",
}


@pytest.mark.parametrize("body", FILES)
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path, body):
    file = tmp_path / "config.py"
    file.write_text(f"def get_config(argument=None):\n    {body}\n")
    with pytest.raises(InputError) as caught:
        config_flag.load([f"--config={file}:x", "--config.seed=1"])
    assert FILES[body] in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="--config=, expected FILE.py"):
        config_flag.load(["--config="])
    (tmp_path / "config.py").write_bytes(b"\xff\xfe")
    for file, words in (("", "Is a directory"), ("nothing.py", "No such file"), ("config.py", "not a Python file")):
        with pytest.raises(InputError, match=f"--config={tmp_path / file}.*{words}"):
            config_flag.load([f"--config={tmp_path / file}"])


def test_the_flags_of_a_command_line():
    argv = ["train.py", "--workdir=x", "--config", "c.py:tiny", "--config.seed", "3", "--noconfig.a.b", "--config.c.d"]
    expected = ["--config=c.py:tiny", "--config.seed=3", "--noconfig.a.b", "--config.c.d"]
    assert config_flag.config_arguments(argv) == expected
    assert config_flag.config_arguments(["launch.py", "--", "--config=x"]) == ["--config=x"]


def test_a_command_reads_its_config_flags_first(monkeypatch, capsys):
    """Whatever is wrong with them is one line and exit code 2; a required flag that is missing too."""
    values = flags.FlagValues()
    config_flag.config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("out", None, "", required=True, flag_values=values)
    monkeypatch.setattr(command_line.flags, "FLAGS", values)
    for arguments, said in (
        ([TINY, "--out=x", "--config.batch.rows=1.5"], "error: --config.batch.rows=1.5, expected an integer\n"),
        ([TINY], "error: --out is required; --help lists the flags\n"),
    ):
        monkeypatch.setattr(command_line.sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.run(lambda argv: 0)
        assert ended.value.code == 2 and capsys.readouterr().err == said
