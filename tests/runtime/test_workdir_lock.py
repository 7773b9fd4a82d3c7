"""Who may write in a workdir, and what a store that fails does to a run."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from jax._src import compiler

from llada_jax.checkpoint import files, saver
from llada_jax.errors import InputError
from llada_jax.runtime import watchdog
from llada_jax.runtime.retry import Retry
from llada_jax.runtime.workdir_lock import LOCK, claimed
from llada_jax.training import loop, save_policy
from tests.helpers import command_lines
from tests.helpers.environment import process_environment
from tests.helpers.waiting import PATIENCE
from tests.training.test_faults import STEPS, faulty_config
from tests.training.test_loop import (  # noqa: F401 (fixtures)
    ROOT,
    assert_same_checkpoint,
    metrics_of,
    small_preset,
    text,
    train,
)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(faulty_config(text), folder)
    return folder


# ---- two trainers


def test_a_second_trainer_is_refused_by_the_name_of_the_first(text, tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(InputError) as caught:
            train(faulty_config(text), tmp_path / "run")
    assert f"process {os.getpid()} on {socket.gethostname()} is training in it" in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    with claimed(tmp_path / "run"):
        pass


def test_a_killed_trainer_leaves_no_lock(tmp_path):
    code = (
        "import sys, time, pathlib; from llada_jax.runtime.workdir_lock import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    env = process_environment()
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {process.pid} on "):
        with claimed(tmp_path):
            pass
    process.kill()
    process.wait()
    process.stdout.close()
    with claimed(tmp_path):
        pass


def test_bad_input_takes_the_workdir_away_again_and_only_that(tmp_path):
    with pytest.raises(InputError, match="later"):
        with claimed(tmp_path / "new"):
            raise InputError("later")
    (tmp_path / "old").mkdir()
    for name in ("old", "kept"):
        with pytest.raises(InputError, match="later"):
            with claimed(tmp_path / name):
                (tmp_path / name / "config.json").touch()
                raise InputError("later")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "old"]


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path):
        pass
    assert "no locks on this file system (No locks available); start no second trainer" in capsys.readouterr().err


# ---- disks


CLAIM_AS_NOBODY = """
import os, pathlib, sys
from llada_jax.runtime.workdir_lock import claimed
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    with claimed(pathlib.Path(sys.argv[1])):
        print("claimed")
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_read_only_workdir_is_one_line_before_any_compute(tmp_path):
    """In a process of its own, that is not root's: root may write everywhere."""
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o555)
    done = command_lines.run(["-c", CLAIM_AS_NOBODY, folder])
    assert done.stdout == f"InputError: --workdir={folder}: cannot be written (Permission denied)\n", done.stderr
    folder.chmod(0o755)


@pytest.fixture
def small_files(monkeypatch):
    """small_files(limit): no file may be longer; a write beyond it fails as on a full disk. small_files(None): any.

    Compiled programs are not kept meanwhile: one that is cut short would stay in the cache.
    """
    monkeypatch.setattr(compiler, "_cache_write", lambda *_: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_from(monkeypatch, small_files, step, saves):
    """The store fails from the save of `step` on, so many times."""
    real, left = saver.Saver.save, [saves]

    def save(self, number, *rest):
        self.wait()
        small_files(20_000 if number >= step and left[0] > 0 else None)
        left[0] -= number >= step
        real(self, number, *rest)

    monkeypatch.setattr(saver.Saver, "save", save)


def patient(text, retries):
    return faulty_config(text, checkpoint__retries=retries, checkpoint__retry_seconds=0.01)


def test_a_full_disk_ends_in_one_line_with_the_last_good_step_kept(text, tmp_path, monkeypatch, small_files, capsys):
    full_from(monkeypatch, small_files, 8, saves=100)
    with pytest.raises(InputError) as caught:
        train(patient(text, retries=2), tmp_path)
    small_files(None)
    assert "could not be saved (" in str(caught.value) and "\n" not in str(caught.value)
    assert "the newest good step is 4; given up after 3 saves that failed in a row" in str(caught.value)
    assert capsys.readouterr().err.count("trying again") == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert saver.weights.verify(tmp_path / "checkpoints" / "4") == []


def test_a_disk_that_is_emptied_costs_no_step(text, whole, tmp_path, monkeypatch, small_files):
    full_from(monkeypatch, small_files, 8, saves=2)
    train(patient(text, retries=3), tmp_path)
    assert saver.steps(tmp_path / "checkpoints")[-1] == STEPS
    assert_same_checkpoint(*(run / "checkpoints" / str(STEPS) for run in (tmp_path, whole)))
    assert metrics_of(tmp_path) == metrics_of(whole)
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_the_last_step_is_saved_again_until_the_disk_takes_it(text, whole, tmp_path, monkeypatch, small_files):
    full_from(monkeypatch, small_files, STEPS, saves=2)
    train(patient(text, retries=3), tmp_path)
    assert_same_checkpoint(*(run / "checkpoints" / str(STEPS) for run in (tmp_path, whole)))


def tmpfs_command(folder: Path, size: str) -> list[str] | None:
    """A prefix that runs a command with a small tmpfs mounted at `folder`; None where that is not allowed."""
    script = f'mount -t tmpfs -o size={size} none "{folder}" && "$@"; code=$?; ls -A "{folder}"/checkpoints; exit $code'
    for prefix in (["unshare", "-m"], ["unshare", "-rm"]):
        if shutil.which("unshare") and subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", folder],
                                                      capture_output=True, check=False).returncode == 0:  # fmt: skip
            return [*prefix, "bash", "-c", script, "bash"]
    return None


def test_the_command_on_a_full_disk_exits_2(text, tmp_path):
    """On a tmpfs of 1 MB; where none can be mounted, with files of 40 kB at most."""
    (tmp_path / "run").mkdir()
    prefix = tmpfs_command(tmp_path / "run", "1m") or ["bash", "-c", 'ulimit -f 40; "$@"', "bash"]
    command = [
        *prefix, sys.executable, "-m", "llada_jax.train", "--config=tests/helpers/soak_config.py:40",
        f"--workdir={tmp_path / 'run'}", f"--config.data.source={text}", f"--config.data.cache={tmp_path / 'data'}",
        "--config.checkpoint.keep_last=None", "--config.checkpoint.retries=1", "--config.checkpoint.retry_seconds=0.1",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be saved" in line or "cannot be written" in line
    assert "llada_jax/errors.py" not in done.stderr  # no stack of ours; tensorstore tells of futures that it drops


def test_attempts_are_patient_but_not_for_ever(monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fails = iter([OSError(errno.EIO, "broken"), OSError(errno.EIO, "broken"), None])

    def action():
        if (error := next(fails)) is not None:
            raise error

    Retry(2, 5.0).attempt(action, "FILE")
    assert pauses == [5.0, 10.0]

    def never():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"FILE: cannot be written \(No space left on device\); given up after 3"):
        Retry(2, 5.0).attempt(never, "FILE")


# ---- damage


def flip_a_bit(step: Path) -> None:
    path = max((p for p in (step / "optimizer").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def remove_a_file(step: Path) -> None:
    (step / "config.json").unlink()


def remove_tensors(step: Path) -> None:
    shutil.rmtree(step / "params")


def truncate_metadata(step: Path) -> None:
    path = step / "digests.json"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_a_manifest(step: Path) -> None:
    path = step / "params" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [flip_a_bit, remove_a_file, remove_tensors, truncate_metadata, truncate_a_manifest])
def test_a_damaged_step_is_set_aside_with_its_reason(text, whole, tmp_path, damage, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run / "checkpoints" / str(STEPS))
    train(faulty_config(text), run)
    assert "step 12 is damaged and set aside: " in capsys.readouterr().out
    reason = (run / "checkpoints" / "12.damaged" / "damaged.txt").read_text()
    assert reason.startswith("checkpoint ") and reason.count("\n") == 1
    assert_same_checkpoint(*(folder / "checkpoints" / str(STEPS) for folder in (run, whole)))
    assert metrics_of(run) == metrics_of(whole)


def test_a_store_that_fails_to_read_once_costs_no_step(text, whole, tmp_path, monkeypatch):
    run, real, failures = tmp_path / "run", files.read_file, [1]
    shutil.copytree(whole, run)

    def flaky(directory, digests, name):
        if failures:
            raise files.DamagedError(f"{name} cannot be read ({failures.pop()})")
        return real(directory, digests, name)

    monkeypatch.setattr(files, "read_file", flaky)
    train(faulty_config(text), run)
    assert not failures and saver.steps(run / "checkpoints") == [4, 8, 12]


# ---- clocks


def test_minutes_by_a_clock_that_does_not_jump(text, whole, tmp_path, monkeypatch):
    """A save every minute, of half a minute a step; the wall clock jumps by years, once while a step is being saved.
    Orbax takes that for a timeout: the save is repeated.
    """
    clock, wall = [0.0], time.time
    real = save_policy.SavePolicy.due

    def due(self):
        clock[0] += 30
        if clock[0] in (210, 270):
            jump = 1e8 if clock[0] == 210 else -1e8
            monkeypatch.setattr(time, "time", lambda: wall() + jump)
        return real(self)

    monkeypatch.setattr(save_policy.SavePolicy, "due", due)
    monkeypatch.setattr(save_policy, "time", type("time", (), {"monotonic": lambda: clock[0], "sleep": time.sleep}))
    train(faulty_config(text, checkpoint__every_minutes=1.0), tmp_path)
    monkeypatch.undo()
    steps = saver.steps(tmp_path / "checkpoints")
    assert steps[:2] == [2, 4] and steps[-1] == STEPS and len(steps) >= 5
    assert metrics_of(tmp_path) == metrics_of(whole)
    assert_same_checkpoint(*(run / "checkpoints" / str(STEPS) for run in (tmp_path, whole)))


# ---- hangs


def test_the_watchdog_counts_its_own_ticks():
    """However long they take: the last of a minute ends it, unless there was a heartbeat before."""
    ticks, ended = [], []

    def wait(seconds):
        ticks.append(seconds)
        if len(ticks) in (20, 40):
            dog.heartbeat()
        return len(ticks) > 1000

    dog = watchdog.Watchdog(1.0, lambda: ended.append(len(ticks)))
    dog._closed = SimpleNamespace(wait=wait)
    dog.run()
    assert ended == [60] and set(ticks) == {3.0}


def test_the_watchdog_ends_a_hang_and_not_what_is_closed():
    ended = threading.Event()
    dog = watchdog.Watchdog(0.1 / 60, ended.set)
    dog.start()
    assert ended.wait(PATIENCE)
    quiet = watchdog.Watchdog(60.0, lambda: pytest.fail("closed"))
    quiet.start()
    quiet.close()
    quiet.join(PATIENCE)
    assert not quiet.is_alive()


def test_a_hang_ends_with_the_stacks_of_all_threads(tmp_path):
    code = (
        "import sys, time, pathlib; from llada_jax.runtime.watchdog import watched\n"
        "def stuck():\n    time.sleep(600)\n"
        "with watched(3 / 60, pathlib.Path(sys.argv[1])) as heartbeat:\n    heartbeat(); stuck()"
    )
    env = process_environment()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == watchdog.EXIT_CODE
    for report in (done.stderr, (tmp_path / "hang.txt").read_text()):
        assert "no progress in 0.05 minutes" in report and "in stuck" in report and "in run" in report


def test_every_step_evaluation_and_save_is_a_heartbeat(text, tmp_path, monkeypatch):
    import contextlib

    beats = []

    @contextlib.contextmanager
    def watched(minutes, workdir, process):
        assert (minutes, workdir, process) == (60.0, tmp_path, 0)
        yield lambda: beats.append(1)

    monkeypatch.setattr(loop, "watched", watched)
    train(faulty_config(text), tmp_path)
    assert len(beats) == STEPS + 1 + STEPS // 4  # an evaluation, a save every fourth step


# ---- preemption


def test_sigterm_leaves_a_checkpoint_and_no_row_of_its_own(text, whole, tmp_path, monkeypatch, capsys):
    """Rows are written every fifth step; SIGTERM comes after the sixth, and is heard after the seventh."""
    due, calls = save_policy.SavePolicy.due, []

    def kill_once(self):
        calls.append(1)
        if len(calls) == 5:  # not asked at step 4, which is saved in any case
            os.kill(os.getpid(), signal.SIGTERM)
        return due(self)

    monkeypatch.setattr(save_policy.SavePolicy, "due", kill_once)
    config = faulty_config(text, log_every_steps=5)
    train(config, tmp_path)
    assert "stopped at step 7" in capsys.readouterr().out and saver.steps(tmp_path / "checkpoints") == [4, 7]
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 5]
    train(config, tmp_path)
    assert_same_checkpoint(*(run / "checkpoints" / str(STEPS) for run in (tmp_path, whole)))
    assert metrics_of(tmp_path) == [row for row in metrics_of(whole) if row["step"] in (1, 5, 10, STEPS)]
