"""The launchers as text against their golden output, against a gcloud of our own, and the scripts that hosts run."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.command_lines import run_all
from tests.helpers.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parents[1] / "data" / "launch"
SUPERVISE = ROOT / "experiments" / "launch" / "supervise.sh"
PLACE = ["--project=P", "--zone=Z"]
RUN = ["--name=mini", *PLACE, "--workdir=gs://B/mini"]
TRAIN = ["--", "--config=configs/wsd.py:tiny", "--config.optimizer.learning_rate=1e-4"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A committed copy of what the launcher needs of this repository."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "experiments" / "launch", folder / "experiments" / "launch")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / ".gitignore").write_text("/runs/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True, env=os.environ | IDENTITY)
    return folder


def launch(repository, *arguments, **environment):
    (done,) = run_all([[repository / "experiments" / "launch" / "launch.py", *arguments]], repository, **environment)
    return done


IDENTITY = {"GIT_AUTHOR_NAME": "n", "GIT_AUTHOR_EMAIL": "e", "GIT_COMMITTER_NAME": "n", "GIT_COMMITTER_EMAIL": "e"}


def commit(repository):
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.strip()


DRY = {
    "tpu_vm": ["tpu_vm", *RUN, "--topology=v5p:4x4x4", "--rows=gs://B/rows", *TRAIN],
    "tpu_vm_slices_watch": [
        "tpu_vm", *RUN, "--topology=v5p:8x8x8", "--slices=2", "--spot", "--action=watch", "--rows=gs://B/rows", *TRAIN,
    ],
    "tpu_vm_shape": [
        "tpu_vm", *RUN, "--topology=v5p:4x4x16", "--reserved", *TRAIN, "--config.data.path=/gcs/my rows",
        "--peer_timeout=300", "--verbosity=1",
    ],
    "tpu_vm_logs": ["tpu_vm", *RUN, "--slices=2", "--action=logs"],
    "tpu_vm_status": ["tpu_vm", *RUN, "--action=status"],
    "tpu_vm_delete": ["tpu_vm", *RUN, "--action=delete"],
    "xpk": [
        "xpk", *RUN, "--cluster=C", "--topology=tpu7x:4x4x8", "--slices=4", *TRAIN, "--config.data.path=/gcs/rows",
    ],
    "xpk_shape": ["xpk", *RUN, "--cluster=C", "--topology=v5p:4x8x8", "--spot", "--rows=gs://B/rows", *TRAIN],
    "xpk_status": ["xpk", *RUN, "--cluster=C", "--action=status"],
    "xpk_delete": ["xpk", *RUN, "--cluster=C", "--action=delete"],
}  # fmt: skip
V6E = [*RUN, "--topology=v6e:8x8"]
BAD = {
    "expected a command, one of tpu_vm, xpk": ["gke"],
    "--name is required": ["tpu_vm"],
    "--topology is required": ["tpu_vm", *RUN, *TRAIN],
    "no such slice": ["tpu_vm", *RUN, "--topology=v5p:3x3x3", *TRAIN],
    "GKE alone serves tpu7x": ["tpu_vm", *RUN, "--topology=tpu7x:4x4x4", *TRAIN],
    "--name=Mini, expected lower-case": ["tpu_vm", *V6E, "--name=Mini", *TRAIN],
    "--workdir=/tmp/x, expected gs://": ["tpu_vm", *V6E, "--workdir=/tmp/x", *TRAIN],
    "the trainer's flags follow --": ["tpu_vm", *V6E],
    "lr": ["tpu_vm", *V6E, *TRAIN, "--config.optimizer.lr=1"],
    "a run on a bucket needs packed rows": ["tpu_vm", *V6E, *TRAIN],
    "config.batch.rows=0": ["tpu_vm", *V6E, *TRAIN, "--config.batch.rows=0"],
    "--workdir: before the --": ["tpu_vm", *V6E, *TRAIN, "--workdir=x"],
    "none.py": ["tpu_vm", *V6E, "--", "--config=configs/none.py"],
    "unknown '--confg.batch.rows=3'": ["tpu_vm", *V6E, *TRAIN, "--confg.batch.rows=3"],
    "unknown 'three'": ["tpu_vm", *V6E, *TRAIN, "three"],
    "--process: the hosts of a slice find each other": ["tpu_vm", *V6E, *TRAIN, "--process=0"],
    "'$' would not reach the hosts": ["tpu_vm", *V6E, *TRAIN, "--config.data.path=$ROWS"],
    "the trainer's flag '--config.init_from=a\\nb': '\\n'": ["tpu_vm", *V6E, *TRAIN, "--config.init_from=a\nb"],
    "--workdir=gs://$B/mini: '$'": ["tpu_vm", *V6E, "--workdir=gs://$B/mini", *TRAIN],
    "--workdir=gs://B/mini*: '*'": ["tpu_vm", *V6E, "--workdir=gs://B/mini*", *TRAIN],
    "--rows=gs://B/my rows: ' '": ["tpu_vm", *V6E, "--rows=gs://B/my rows", *TRAIN],
    "--rows=gs://, expected gs://BUCKET/ROWS": ["tpu_vm", *V6E, "--rows=gs://", *TRAIN],
    "39 at most": ["tpu_vm", *V6E, f"--name={40 * 'm'}", *TRAIN],
    "--name=mini-, expected": ["xpk", *V6E, "--cluster=C", "--name=mini-", *TRAIN],
    "--zone=us-east5 is a region, expected a zone of it, such as us-east5-a": [
        "tpu_vm",
        *V6E,
        "--zone=us-east5",
        *TRAIN,
    ],
    "--spot and --reserved exclude each other": ["tpu_vm", *V6E, "--spot", "--reserved", *TRAIN],
    "--cluster: not of tpu_vm": ["tpu_vm", *V6E, "--cluster=C", *TRAIN],
    "--base_image: not of tpu_vm": ["tpu_vm", *V6E, "--base_image=python:3.11", *TRAIN],
    "--reserved: not of xpk": ["xpk", *V6E, "--cluster=C", "--reserved", *TRAIN],
    "--runtime_version: not of xpk": ["xpk", *V6E, "--cluster=C", "--runtime_version=r", *TRAIN],
    "--topology=v5e:2x2: XPK knows no such slice, of v5e it has 2x4, 4x4": [
        "xpk",
        *RUN,
        "--cluster=C",
        "--topology=v5e:2x2",
        *TRAIN,
    ],
    "--topology=v5p:4x4x260: XPK knows sides up to 256": [
        "xpk",
        *RUN,
        "--cluster=C",
        "--topology=v5p:4x4x260",
        *TRAIN,
    ],
    "unknown chip": ["tpu_vm", *RUN, "--topology=v3:2x2x1", *TRAIN],
    "--peer_timeout=soon": [
        "tpu_vm",
        *V6E,
        "--rows=gs://B/rows",
        *TRAIN,
        "--peer_timeout=soon",
    ],
    "--cluster is required": ["xpk", *V6E, *TRAIN],
    "--action=watch: of tpu_vm": ["xpk", *V6E, "--cluster=C", "--action=watch"],
}


@pytest.fixture(scope="module")
def printed(repository):
    """{name or message of a command above: what came of it}, and nothing on the path to run."""
    script = repository / "experiments" / "launch" / "launch.py"
    commands = [[script, "--dry_run", *arguments] for arguments in DRY.values()]
    commands += [[script, *arguments] for arguments in BAD.values()]
    (repository / "runs").mkdir()
    return dict(zip([*DRY, *BAD], run_all(commands, cwd=repository), strict=True))


@pytest.mark.parametrize("golden", DRY)
def test_dry_run_prints_every_command_and_runs_none(repository, printed, golden):
    done = printed[golden]
    assert done.returncode == 0, done.stderr
    found = done.stdout.replace(commit(repository), "COMMIT")
    assert found == (GOLDENS / f"{golden}.txt").read_text()
    assert not list((repository / "runs").iterdir())


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_before_any_command(printed, message):
    done = printed[message]
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert done.stdout == ""


def test_a_machine_without_the_tool_is_told_before_anything_runs(repository):
    arguments = ["xpk", *V6E, "--cluster=C", "--rows=gs://B/rows", *TRAIN]
    done = launch(repository, *arguments, PATH="/nowhere")
    assert done.returncode == 2 and done.stdout == "" and "xpk is not installed" in done.stderr


def test_a_tree_with_changes_is_refused_or_sent_as_it_is(repository, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    with open(copy / "configs" / "wsd.py", "a") as file:
        file.write("# changed\n")
    (copy / "new.py").write_text("")
    script = [copy / "experiments" / "launch" / "launch.py", "tpu_vm", *V6E, "--dry_run", "--rows=gs://B/rows"]
    refused, allowed, unknown = run_all(
        [[*script, *flags, *TRAIN] for flags in ([], ["--allow_dirty"], ["--commit=HEAD~9"])], copy, **IDENTITY
    )
    assert refused.returncode == 2 and "is not committed; commit it, or --allow_dirty" in refused.stderr
    assert allowed.returncode == 0 and "# left behind, as git does not know it: new.py" in allowed.stdout
    sent = next(line.split()[-1] for line in allowed.stdout.splitlines() if line.startswith("git archive"))
    shown = subprocess.run(["git", "show", f"{sent}:configs/wsd.py"], cwd=copy, capture_output=True, text=True)
    assert sent != commit(copy) and shown.stdout.endswith("# changed\n")
    assert unknown.returncode == 2 and "HEAD~9" in unknown.stderr


FAKE_GCLOUD = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *describe*) state=$(head -n 1 "$STATES"); sed -i 1d "$STATES"; echo "$state" ;;
  *exit_code*) cat "$CODES" 2>/dev/null ;;
esac
"""


@pytest.mark.parametrize("codes,expected", [("0\n0\n", 0), ("0\n2\n", 1)])
def test_watch_queues_again_what_was_taken_back_and_gives_back_what_has_ended(repository, tmp_path, codes, expected):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(FAKE_GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "states").write_text("\nPROVISIONING\nACTIVE\nSUSPENDED\nACTIVE\n")
    (tmp_path / "codes").write_text("")
    arguments = [
        "tpu_vm",
        *RUN,
        "--topology=v6e:8x8",
        "--rows=gs://B/rows",
        "--action=watch",
        "--poll_seconds=0.3",
        *TRAIN,
    ]
    env = {"CALLS": str(tmp_path / "calls"), "STATES": str(tmp_path / "states"), "CODES": str(tmp_path / "codes")}
    env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    fill = f"while [ -s {tmp_path / 'states'} ]; do sleep 0.05; done; printf '{codes}' >{tmp_path / 'codes'}"
    with subprocess.Popen(["bash", "-c", fill]):
        done = launch(copy, *arguments, **env)
    assert done.returncode == expected, done.stderr
    calls = [" ".join(line.split()[:4]) for line in (tmp_path / "calls").read_text().splitlines() if "queued" in line]
    verbs = [call.split()[-1] for call in calls if not call.endswith("describe")]
    assert verbs == ["create", "delete", "create", "delete"]
    assert "SUSPENDED: queueing again" in done.stdout
    assert subprocess.run(["bash", "-n", str(copy / "runs/launch/mini/startup.sh")]).returncode == 0
    archive = copy / "runs" / "launch" / "mini" / f"{commit(copy)}.tar.gz"
    listed = subprocess.run(["tar", "tzf", str(archive)], capture_output=True, text=True).stdout
    assert "experiments/launch/worker.sh" in listed and "experiments/launch/requirements.lock" in listed


def test_the_trainers_flags_are_known():
    """Of each it is said whether a launch leaves it to its user."""
    (done,) = run_all([[ROOT / "llada_jax" / "train.py", "--help"]])
    named = set(re.findall(r"^  --(?:\[no\])?(\w+):", done.stdout, re.MULTILINE)) - {"config"}
    text = (ROOT / "experiments" / "launch" / "trainer_flags.py").read_text()
    assert {"workdir", "peer_timeout"} <= named and all(f'"{name}"' in text for name in named), named


# ---- supervise.sh


def supervise(tmp_path, script, **settings):
    (tmp_path / "run.sh").write_text(script)
    env = os.environ | {"SUPERVISE_WAIT": "0", "SUPERVISE_LONGEST": "0", "COUNT": str(tmp_path / "count")} | settings
    return subprocess.Popen(
        ["bash", str(SUPERVISE), str(tmp_path / "logs"), "bash", str(tmp_path / "run.sh")],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


COUNTED = 'echo x >>"$COUNT"; n=$(wc -l <"$COUNT")\n'


def test_supervisor_starts_again_until_it_has_finished(tmp_path):
    script = COUNTED + 'echo "start $n"; [ $n = 1 ] && kill -9 $$; [ $n = 2 ] && exit 1\n'
    script += '[ $n = 3 ] && { echo "SIGTERM: saving a checkpoint" >&2; exit 0; }; echo "finished at step 9: DIR"'
    process = supervise(tmp_path, script)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    log = (tmp_path / "logs" / "train.log").read_text()
    for text in (printed, log):
        assert [line for line in text.splitlines() if line.startswith("start ")] == [f"start {n}" for n in (1, 2, 3, 4)]
    assert (tmp_path / "logs" / "exit_code").read_text() == "0\n"
    assert "ended with 137" in log and "ended with 1 after" in log and "ended with 0 after" in log


def test_supervisor_stops_at_bad_input_and_after_so_many_failures(tmp_path):
    process = supervise(tmp_path, COUNTED + "exit 2")
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and (tmp_path / "count").read_text() == "x\n"
    assert (tmp_path / "logs" / "exit_code").read_text() == "2\n"
    (tmp_path / "count").unlink()
    process = supervise(tmp_path, COUNTED + "exit 3", SUPERVISE_ATTEMPTS="3")
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and (tmp_path / "count").read_text() == "x\n" * 3 and "gave up: 3 starts" in printed
    assert (tmp_path / "logs" / "exit_code").read_text() == "3\n"


def test_supervisor_passes_sigterm_on_and_waits_for_the_save(tmp_path):
    script = "trap 'sleep 1; echo \"stopped at step 5: DIR\"; exit 0' TERM\necho ready\nwhile true; do sleep 0.1; done"
    process = supervise(tmp_path, script)
    log = tmp_path / "logs" / "train.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and "stopped at step 5" in log.read_text()
    assert not (tmp_path / "logs" / "exit_code").exists()


# ---- fetch.py


def test_fetch_copies_a_folder_once(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"12345")
    (source / "deep" / "b").write_bytes(b"67")
    out.mkdir()
    (out / "a").write_bytes(b"1")  # a copy that was cut short
    command = [ROOT / "experiments" / "launch" / "fetch.py", f"--source={source}", f"--out={out}"]
    first, second, wrong = run_all([command, command, [*command, "--source=/nowhere"]])
    assert first.stdout.startswith("7 bytes") and second.stdout.startswith("0 bytes")
    assert (out / "a").read_bytes() == b"12345" and (out / "deep" / "b").read_bytes() == b"67"
    assert wrong.returncode == 2 and "/nowhere" in wrong.stderr


# ---- worker.sh

STAMP = "touch .venv/installed-$(cksum <experiments/launch/requirements.lock | cut -d' ' -f1)"


@pytest.fixture
def worker(tmp_path):
    """run(what .venv's python does, installed) runs worker.sh; run.folder has its logs, and the calls made."""
    shutil.copytree(ROOT / "experiments" / "launch", tmp_path / "app" / "experiments" / "launch")
    bin_ = tmp_path / "bin"
    bin_.mkdir()

    def program(path, script):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def start(python, installed=True, **settings):
        program(tmp_path / "app" / ".venv" / "bin" / "python", python)
        program(bin_ / "gcloud", 'echo "gcloud $*" >>"$CALLS.gcloud"')
        program(bin_ / "python3.11", 'echo "venv" >>"$CALLS"')
        if installed:
            subprocess.run(STAMP, shell=True, cwd=tmp_path / "app", check=True)
        env = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "LLADA_JAX_LOGS": str(tmp_path / "logs")}
        env |= {"CALLS": str(tmp_path / "calls"), "WORKER_WAIT": "0", "SUPERVISE_WAIT": "0", "SUPERVISE_LONGEST": "0"}
        script = str(tmp_path / "app" / "experiments" / "launch" / "worker.sh")
        return subprocess.Popen(
            ["bash", script, "gs://B/run", "gs://B/rows", "--config=configs/wsd.py:tiny"],
            env=env | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(*arguments, **settings):
        process = start(*arguments, **settings)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    run.start, run.folder = start, tmp_path
    return run


def test_worker_trains_under_the_supervisor_and_reports_the_end(worker):
    done = worker('echo "python $*"')
    assert done.returncode == 0, done.stderr
    rows = worker.folder / "logs" / "rows"
    assert f"python experiments/launch/fetch.py --source=gs://B/rows --out={rows}" in done.stdout
    flags = f"--workdir=gs://B/run --config=configs/wsd.py:tiny --config.data.path={rows}"
    assert f"python -m llada_jax.train {flags}" in (worker.folder / "logs" / "train.log").read_text()
    assert host_file("exit_code") in (worker.folder / "calls.gcloud").read_text()


def host_file(kind):
    host = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    return f"gs://B/run/hosts/{host}.{kind}"


FAILS_TWICE = 'echo "$*" >>"$CALLS"; n=$(grep -c -- "{}" "$CALLS"); case "$*" in *{}*) [ "$n" -gt 2 ] || exit {};; esac'


@pytest.mark.parametrize("code", [1, 2])  # pip ends with 2 where a connection broke
def test_worker_installs_again_after_a_hiccup(worker, code):
    done = worker(FAILS_TWICE.format("--requirement", "--requirement", code), installed=False)
    assert done.returncode == 0, done.stderr
    calls = (worker.folder / "calls").read_text()
    assert calls.count("venv") == 3 and calls.count("--editable") == 1 and calls.count("llada_jax.train") == 1
    assert f"install ended with {code}, try 2 of 4" in (worker.folder / "logs" / "train.log").read_text()


def test_worker_copies_rows_again_after_a_hiccup(worker):
    done = worker(FAILS_TWICE.format("fetch", "fetch", 1))
    assert done.returncode == 0, done.stderr
    assert (worker.folder / "calls").read_text().count("fetch.py") == 3


@pytest.mark.parametrize("installed,failing", [(False, "pip"), (True, "fetch")])
def test_worker_that_cannot_begin_is_started_again_by_its_master(worker, installed, failing):
    """42: XPK's JobSet restarts it, and so does systemd (the startup script in the goldens)."""
    (worker.folder / "logs").mkdir()
    (worker.folder / "logs" / "exit_code").write_text("0\n")  # of an earlier run
    done = worker(f'echo "$*" >>"$CALLS"; case "$*" in *{failing}*) exit 1;; esac', installed, WORKER_TRIES="2")
    assert done.returncode == 42, done.stderr
    calls = (worker.folder / "calls").read_text()
    assert len([line for line in calls.splitlines() if failing in line]) == 2 and "llada_jax.train" not in calls
    assert not (worker.folder / "logs" / "exit_code").exists() and not (worker.folder / "calls.gcloud").exists()


def test_worker_ends_at_rows_that_are_not_there(worker):
    done = worker('case "$*" in *fetch*) echo "error: --source=gs://B/rows: no such folder" >&2; exit 2;; esac')
    assert done.returncode == 2
    log = (worker.folder / "logs" / "train.log").read_text()
    assert "error: --source=gs://B/rows: no such folder" in log and "no rows" in log
    assert (worker.folder / "logs" / "exit_code").read_text() == "2\n"
    assert host_file("exit_code") in (worker.folder / "calls.gcloud").read_text()


@pytest.mark.parametrize(
    "trainer,code,recorded",
    [
        ("exit 2", 2, "2\n"),
        ("exit 75", 75, "75\n"),  # the supervisor gave up
        ("kill -9 $$", 1, "137\n"),  # likewise; 137 would be restarted for ever
        ("exit 42", 1, "42\n"),
        ("kill -9 $PPID; sleep 1", 42, None),  # the supervisor was killed, as by a host out of memory
    ],
)
def test_worker_says_whether_another_start_may_help(worker, trainer, code, recorded):
    done = worker(f'case "$*" in *llada_jax.train*) {trainer};; esac', SUPERVISE_ATTEMPTS="2")
    assert done.returncode == code, done.stderr
    path = worker.folder / "logs" / "exit_code"
    assert (path.read_text() if path.exists() else None) == recorded


def test_worker_told_to_stop_saves_and_ends_with_143(worker):
    script = """trap 'echo saved >>"$CALLS"; exit 0' TERM; echo ready >>"$CALLS"; while true; do sleep 0.1; done"""
    process = worker.start(f'case "$*" in *llada_jax.train*) {script};; esac')
    wait_until((worker.folder / "calls").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and (worker.folder / "calls").read_text() == "ready\nsaved\n"
    assert not (worker.folder / "logs" / "exit_code").exists()
