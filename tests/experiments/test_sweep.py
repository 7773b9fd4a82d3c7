"""Sweeps: points, resuming, failures and the table."""

import fcntl
import json
import shlex
from pathlib import Path

import pytest

from llada_jax import config_flag
from tests.helpers.command_lines import run_all
from tests.helpers.experiments import load

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return [ROOT / "experiments" / "sweep.py", "--config=configs/ar.py:tiny,length=64,steps=4", *arguments]


def sweep(*arguments):
    (done,) = run_all([command(*arguments)])
    return done


@pytest.fixture(scope="module")
def module():
    return load("sweep", "points")


@pytest.mark.parametrize(
    "text,values",
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("(1,4),(1,4,32)", ["(1,4)", "(1,4,32)"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("[(1,2),3],{4,5}", ["[(1,2),3]", "{4,5}"]),
        ("x", ["x"]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_inside_brackets_and_quotes_belong_to_a_value(module, text, values):
    assert module.split_values(text) == values


@pytest.mark.parametrize("text", ["(1,2", "1)", "'a", "(1]("])
def test_brackets_without_their_other_half(module, text):
    with pytest.raises(ValueError, match="other half"):
        module.split_values(text)


@pytest.mark.parametrize(
    "text,value",
    [
        ("'A:0.7,B:0.3'", "A:0.7,B:0.3"), ("''", ""), ('""', ""), ("\"it's\"", "it's"), ("('a','b')", "('a','b')"),
        ("'a','b'", "'a','b'"), ("'", "'"), ("", ""), ("'a\"", "'a\""), ("1e-3", "1e-3"),
    ],
)  # fmt: skip
def test_quotes_around_a_value_are_not_of_it(module, text, value):
    assert module.unquoted(text) == value


def test_names_of_points_are_folders_and_differ(module):
    assert module.point_name({"optimizer.learning_rate": "1e-4", "batch.rows": "4"}) == "learning_rate=1e-4,rows=4"
    points = [
        {"a.x": "(1, 2)"},
        {"a.x": "(1  2)"},
        {"a.x": "1", "b.x": "2"},
        {"a.x": "2", "b.x": "1"},
        {"a.x": "y" * 300},
    ]
    names = {module.point_name(point) for point in points}
    assert len(names) == len(points) and all("/" not in name and len(name) < 120 for name in names)


ROWS = [
    {"step": 1, "phase": "warmup", "block_size": 1, "loss": 3.0, "tokens_per_second": 10.0},
    {"step": 2, "phase": "stable", "block_size": 32, "loss": 2.0, "tokens_per_second": 12.0},
    {"step": 2, "block_size": 1, "nelbo": 2.5, "nelbo_stderr": 0.1},
    {"step": 2, "block_size": 32, "nelbo": 2.75, "nelbo_stderr": 0.2},
]


def test_table_has_the_last_values(module):
    found = module.last_values([*ROWS, {"step": 3, "phase": "stable", "block_size": 32, "loss": 1.5}])
    assert (found["step"], found["loss"], found["NELBO 32"], found["NELBO 1 stderr"]) == (3, 1.5, 2.75, 0.1)
    text = module.table([{"point": "x", "optimizer.learning_rate": "1", **found}, {"point": "y", "failure": "a|b"}])
    lines = text.splitlines()
    assert len(lines) == 4 and len({line.count("|") - line.count("\\|") for line in lines}) == 1
    assert "2.7500 ± 0.2000" in lines[2] and "a\\|b" in lines[3]


def test_dry_run_prints_the_commands_of_a_list(tmp_path):
    points = tmp_path / "points.txt"
    points.write_text("# two\noptimizer.learning_rate=1e-3 batch.rows=2\n\nschedule.kind=ar  # the same\n")
    done = sweep(f"--list={points}", f"--out={tmp_path / 'out'}", "--dry_run", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    common = "--config=configs/ar.py:tiny,length=64,steps=4 --config.seed=3"
    assert len(lines) == 2 and lines[0].endswith(
        f"{common} --config.optimizer.learning_rate=1e-3 --config.batch.rows=2"
    )
    assert f"--workdir={tmp_path / 'out' / 'kind=ar'} {common} --config.schedule.kind=ar" in lines[1]
    assert not (tmp_path / "out").exists()


def test_quoted_and_empty_values_reach_their_fields(tmp_path):
    points = tmp_path / "points.txt"
    points.write_text(
        """data.mixture='A:0.7,B:0.3' stage=''\ndata.mixture="'C D:1'" lora.targets="('query','value')"\n"""
    )
    common = [f"--out={tmp_path / 'out'}", "--dry_run", "--config.batch.rows", "2"]
    swept, listed = run_all(
        [
            command(*common, "--sweep=data.mixture='A:0.7,B:0.3','A:0.5,B:0.5'", "--sweep=alignment='',shifted"),
            command(*common, f"--list={points}"),
        ]
    )
    found = [config_flag.load(config_flag.config_arguments(shlex.split(line))) for line in swept.stdout.splitlines()]
    assert {config.batch.rows for config in found} == {2}
    assert [(config.data.mixture, config.alignment) for config in found] == [
        ("A:0.7,B:0.3", ""), ("A:0.7,B:0.3", "shifted"), ("A:0.5,B:0.5", ""), ("A:0.5,B:0.5", "shifted")
    ]  # fmt: skip
    first, second = (config_flag.load(config_flag.config_arguments(shlex.split(x))) for x in listed.stdout.splitlines())
    assert (first.data.mixture, first.stage) == ("A:0.7,B:0.3", "")
    assert (second.data.mixture, second.lora.targets) == ("C D:1", ("query", "value"))


def test_a_swept_field_replaces_the_common_value(tmp_path):
    """Flags of a tuple that come twice are joined, by ml_collections."""
    common = ["--config.evaluation.block_sizes=(1,)", "--config.data.patterns=*.py", "--config.seed=1"]
    done = sweep(*common, f"--out={tmp_path}", "--dry_run", "--sweep=evaluation.block_sizes=(1,4),(1,32)")
    configs = [config_flag.load(shlex.split(line)) for line in done.stdout.splitlines() if "llada_jax.train" in line]
    assert [config.evaluation.block_sizes for config in configs] == [(1, 4), (1, 32)]
    assert {(config.seed, config.data.patterns) for config in configs} == {(1, ("*.py",))}


def test_pod_jobs_are_launched_by_the_launcher(tmp_path):
    launch = "--launch=tpu_vm --topology=v6e:4x4 --project=P --zone=Z --rows=gs://B/rows --commit=HEAD"
    common = ["--sweep=batch.rows=4,8", "--dry_run"]
    done = sweep(*common, "--out=gs://B/sweep", launch + " --allow_dirty")
    assert done.returncode == 0, done.stderr
    for number, rows in enumerate((4, 8)):
        assert f"queued-resources create sweep-{number} --project=P" in done.stdout
        assert f"gs://B/sweep/rows={rows} gs://B/rows" in done.stdout and f"--config.batch.rows={rows}" in done.stdout
    done = sweep(*common, f"--out={tmp_path}", launch)
    assert done.returncode == 2 and "expected gs://" in done.stderr


BAD = {
    "--sweep=FIELD=VALUE,VALUE... or --list=FILE is required": [],
    "--sweep=optimizer.lr=1: no such field, config.optimizer.lr": ["--sweep=optimizer.lr=1"],
    "--sweep=optimizer=1: config.optimizer is a section": ["--sweep=optimizer=1"],
    "--config.batch.rows=two, expected an integer": ["--sweep=batch.rows=1,two"],
    "--config.evaluation.block_sizes=('4',): '4'": ["--sweep=evaluation.block_sizes=(1,4),('4',)"],
    "--config.batch.rows=, expected an integer": ["--sweep=batch.rows=1,''"],
    "--config.lr: no such field": ["--sweep=batch.rows=1", "--config.lr=3"],
    "expected FIELD=VALUE": ["--sweep=batch.rows"],
    "one that comes twice": ["--sweep=batch.rows=1,1"],
    "an empty value": ["--sweep=batch.rows=1,"],
    "without its other half": ["--sweep=batch.rows=(1"],
    "swept twice": ["--sweep=batch.rows=1", "--sweep=batch.rows=2"],
    "/nowhere": ["--list=/nowhere"],
}


def test_bad_input_is_one_line(tmp_path):
    out = f"--out={tmp_path / 'out'}"
    for message, done in zip(BAD, run_all([command(out, *arguments) for arguments in BAD.values()]), strict=True):
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_point_is_named_and_the_others_go_on(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    out = tmp_path / "out"
    arguments = [
        f"--out={out}", "--sweep=optimizer.learning_rate=1e-2,-1.0", f"--config.data.source={text}",
        "--parallel=2", "--config.data.patterns=('*.txt',)", "--config.batch.rows=1", "--config.evaluation.rows=1",
        "--config.evaluation.block_sizes=(1,)",
    ]  # fmt: skip
    first, second, other = run_all([command(*arguments), command(*arguments), command(*arguments, "--config.seed=1")])
    assert first.returncode == second.returncode == 1
    assert "learning_rate=-1.0: exit code 2: error: config.optimizer.learning_rate=-1.0" in first.stderr
    assert "learning_rate=1e-2: training" in first.stdout and "learning_rate=1e-2:" not in second.stdout
    assert "learning_rate=-1.0: going on" in second.stdout  # tried again
    rows = json.loads((out / "results.json").read_text())
    assert [row["point"] for row in rows] == ["learning_rate=1e-2", "learning_rate=-1.0"]
    assert rows[0]["step"] == 4 and rows[0]["NELBO 1"] > 0 and "exit code 2" in rows[1]["failure"]
    assert (out / "results.md").read_text() in second.stdout
    assert other.returncode == 2 and "of other flags" in other.stderr and "choose another --out" in other.stderr


CONFIG = "from llada_jax.training.config import default_config\n\n\ndef get_config(argument=None):\n"
CONFIG += "    config = default_config('tiny')\n    config.schedule.kind, config.schedule.steps = 'ar', {steps}\n"
CONFIG += "    return config\n"


def metrics_at(folder, step):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")


def test_the_table_says_what_has_not_finished_and_mixes_no_configs(tmp_path):
    file, out, records = tmp_path / "c.py", tmp_path / "out", load("sweep", "records")
    file.write_text(CONFIG.format(steps=3))
    before = json.loads(config_flag.load([f"--config={file}"]).to_json())
    file.write_text(CONFIG.format(steps=4))
    states = [
        ({"finished": True}, 4, None),
        ({"finished": True, "config": before}, 3, "of another config, config.schedule.steps was 3, is now 4"),
        ({"failure": "exit code 2: error: no"}, 2, "exit code 2: error: no"),
        ({}, 2, "still running, at step 2 of 4"),
        ({}, 2, "stopped, at step 2 of 4"),
        ({"launched": True}, 2, "launched, at step 2 of 4"),
        ({"launched": True}, 4, None),
    ]
    for seed, (changes, step, _) in enumerate(states):
        folder = out / f"seed={seed}"
        metrics_at(folder, step)
        flags = [f"--config={file}", f"--config.seed={seed}"]
        record = records.new_record(flags, json.loads(config_flag.load(flags).to_json())) | changes
        records.write_record(folder, record)
    with open(out / "seed=3" / "trainer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = [ROOT / "experiments" / "sweep.py", f"--config={file}", f"--out={out}", "--sweep=seed=0,1,2,3,4,5,6"]
        (done,) = run_all([[*line, "--table"]])
    assert done.returncode == 0, done.stderr
    rows = {row["seed"]: row for row in json.loads((out / "results.json").read_text())}
    assert [rows[str(seed)].get("failure") for seed in range(7)] == [failure for *_, failure in states]
    assert [name for name in rows if "loss" not in rows[name]] == ["1"]
    assert list(rows)[:2] == ["0", "6"]  # the finished ones come first


def test_a_point_whose_config_file_was_edited_is_trained_anew(tmp_path):
    file, out, records = tmp_path / "c.py", tmp_path / "out", load("sweep", "records")
    file.write_text(CONFIG.format(steps=3))
    flags = [f"--config={file}", "--config.seed=0"]
    record = records.new_record(flags, json.loads(config_flag.load(flags).to_json()))
    metrics_at(out / "seed=0", 3)
    records.write_record(out / "seed=0", record | {"finished": True})
    sweep = [ROOT / "experiments" / "sweep.py", f"--config={file}", f"--out={out}", "--sweep=seed=0"]
    (done,) = run_all([sweep])
    assert done.returncode == 0 and "training" not in done.stdout
    file.write_text(CONFIG.format(steps=0))  # which is refused at once
    done, again = run_all([sweep, sweep])
    kept = out / "replaced" / "seed=0-1"
    assert f"seed=0: config.schedule.steps was 3, is now 0; what was there is in {kept}" in done.stdout
    assert "seed=0: exit code 2: error: config.schedule" in done.stderr
    assert json.loads((kept / "sweep.json").read_text())["finished"] and (kept / "metrics.jsonl").exists()
    (row,) = json.loads((out / "results.json").read_text())
    assert "loss" not in row and "exit code 2" in row["failure"]
    assert again.returncode == 1 and [path.name for path in (out / "replaced").iterdir()] == ["seed=0-1"]
    (table,) = run_all([[*sweep, "--table"]])
    assert "exit code 2" in table.stdout


def test_the_table_ranks_by_the_last_nelbo_or_any_column(tmp_path):
    for rate, loss, nelbo in (("1", 1.0, 3.0), ("2", 2.0, 2.5), ("3", float("nan"), float("nan"))):
        folder = tmp_path / f"learning_rate={rate}"
        folder.mkdir()
        rows = [ROWS[1] | {"loss": loss}, ROWS[2], ROWS[3] | {"nelbo": nelbo}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--out={tmp_path}", "--sweep=optimizer.learning_rate=4,3,2,1", "--table"]
    ranks = {}
    flags = ("", "--rank_by=loss", "--rank_by=NELBO 32", "--rank_by=accuracy")
    for by, done in zip(flags, run_all([command(*arguments, *filter(None, [by])) for by in flags]), strict=True):
        ranks[by] = [line.split()[1] for line in done.stdout.splitlines()[2:]]
    assert ranks[""] == ranks["--rank_by=NELBO 32"] == ["2", "1", "4", "3"]
    assert ranks["--rank_by=loss"] == ["1", "2", "4", "3"]
    assert done.returncode == 2 and "--rank_by=accuracy, expected one of optimizer.learning_rate, step" in done.stderr
