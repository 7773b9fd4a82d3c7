"""What launch.py gives XPK, as the real XPK understands it, and the container's script of its manifest, as it runs."""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.command_lines import run_all
from tests.helpers.waiting import PATIENCE, wait_until
from tests.helpers.xpk_tool import manifest, xpk  # noqa: F401

ROOT = Path(__file__).parents[2]
PLACE = ["--name=mini", "--cluster=c", "--project=my-project", "--zone=us-east5-a", "--workdir=gs://b/mini"]
# Quotes, spaces, and what YAML, a shell or a format string reads otherwise.
ODD = ["""--config.data.path=/gcs/my rows: {a} #1 'x' "y" \\n %d !z *""", "--config.init_from="]
TRAINER = """#!/usr/bin/env bash
[ "$1 $2" = "-m llada_jax.train" ] || exit 0
printf '%s\\n' "${@:3}" >"$SAVED.arguments"
trap 'sleep 1; echo "stopped at step 5: DIR"; echo 5 >"$SAVED"; exit 0' TERM
touch "$SAVED.ready"
while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def job(xpk, tmp_path_factory):  # noqa: F811
    """The JobSet of a launch on 16 hosts."""
    home = tmp_path_factory.mktemp("xpk")
    arguments = ["xpk", *PLACE, "--topology=v5p:4x4x4", "--slices=2", "--allow_dirty", "--dry_run"]
    launch = [ROOT / "experiments/launch/launch.py", *arguments, "--", "--config=configs/wsd.py:tiny", *ODD]
    (done,) = run_all([launch])
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("xpk workload create"))
    command = [f"--script-dir={home}" if x.startswith("--script-dir=") else x for x in shlex.split(line)]
    return manifest(xpk, home, command)


def parts(job):
    """(of the JobSet: what a slice is, of its pods)"""
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    return replicated, spec, spec["template"]["spec"]


def test_the_slice_is_the_one_that_was_asked_for(job):
    replicated, slice_, pod = parts(job)
    assert replicated["replicas"] == 2 and slice_["parallelism"] == 64 // 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert pod["terminationGracePeriodSeconds"] == 120


def test_exit_codes_that_it_restarts(job):
    """Those of worker.sh: 42 and 143 go on; 0, 1 and 2 are an end."""
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 1000
    (rule,) = parts(job)[1]["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert {42, 143} <= set(codes["values"]) and not {1, 2} & set(codes["values"])


def test_its_script_saves_at_sigterm_and_ends_so_that_it_is_restarted(job, tmp_path):
    (container,) = parts(job)[2]["containers"]
    *_, script = container["command"]
    assert container["command"][:2] == ["bash", "-c"] and "(exec bash experiments/launch/worker.sh" in script
    process = start(script, tmp_path)
    await_file(process, tmp_path / "saved.ready")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert (tmp_path / "saved").read_text() == "5\n", printed
    assert process.returncode == 143 and "stopped at step 5" in printed
    assert (tmp_path / "saved.arguments").read_text().splitlines() == [
        "--workdir=gs://b/mini", "--config=configs/wsd.py:tiny", *ODD
    ]  # fmt: skip
    # The same with anything behind the program, as the script is made: its shell alone hears of the signal.
    behind = script.replace("(exec bash experiments/launch/worker.sh", "(bash experiments/launch/worker.sh", 1)
    behind = behind.replace(") & PID=$!", "; echo done) & PID=$!", 1)
    (tmp_path / "saved").unlink(), (tmp_path / "saved.ready").unlink()
    process = start(behind, tmp_path)
    try:
        await_file(process, tmp_path / "saved.ready")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE)
        assert not (tmp_path / "saved").exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def start(script, folder):
    """It runs as in its container: the code is the working directory, installed already."""
    if not (folder / "app").exists():
        shutil.copytree(ROOT / "experiments" / "launch", folder / "app" / "experiments" / "launch")
        (folder / "app" / ".venv" / "bin").mkdir(parents=True)
        python = folder / "app" / ".venv" / "bin" / "python"
        python.write_text(TRAINER)
        python.chmod(0o755)
        stamp = "touch .venv/installed-$(cksum <experiments/launch/requirements.lock | cut -d' ' -f1)"
        subprocess.run(stamp, shell=True, cwd=folder / "app", check=True)
    env = {"PATH": "/usr/bin:/bin", "LLADA_JAX_LOGS": str(folder / "logs"), "SAVED": str(folder / "saved")}
    return subprocess.Popen(
        ["bash", "-c", script], cwd=folder / "app", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def await_file(process, path):
    wait_until(lambda: path.exists() or process.poll() is not None)
    assert process.poll() is None, process.poll()
