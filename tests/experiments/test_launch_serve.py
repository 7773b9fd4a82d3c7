"""serve.sh as a TPU VM runs it, with a systemctl, a Python and a curl of our own: the unit, and how it ends."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.command_lines import run_all

ROOT = Path(__file__).parents[2]
FLAGS = ["--max_rows=16", "--port=8123"]


@pytest.fixture
def host(tmp_path):
    """run(*arguments of serve.sh, of our programs) -> what came of it; run.unit, run.calls: what it wrote."""
    shutil.copytree(ROOT / "experiments" / "launch", tmp_path / "app" / "experiments" / "launch")
    (tmp_path / "units").mkdir()
    (tmp_path / "keys").write_text("sesame\n")

    def program(path, script):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def run(*arguments, systemctl='[ "$1" != is-failed ]', curl="true", python="true", **settings):
        told = f'echo "$(basename "$0") $*" >>{tmp_path}/calls; '
        program(tmp_path / "bin" / "systemctl", told + systemctl)
        program(tmp_path / "bin" / "curl", told + curl)
        program(tmp_path / "bin" / "python3.11", told + "true")
        program(tmp_path / "app" / ".venv" / "bin" / "python", told + python)
        folders = {name: str(tmp_path / name.lower()) for name in ("ETC", "UNITS", "DATA")}
        env = os.environ | {f"SERVE_{name}": folder for name, folder in folders.items()}
        env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SERVE_POLL": "0", "WORKER_WAIT": "0"} | settings
        command = ["bash", str(tmp_path / "app" / "experiments" / "launch" / "serve.sh"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    run.folder, run.unit = tmp_path, tmp_path / "units" / "llada_jax_serve.service"
    run.keys, run.calls = str(tmp_path / "keys"), lambda: (tmp_path / "calls").read_text()
    return run


def test_it_installs_copies_starts_and_waits_until_the_server_is_healthy(host):
    done = host("gs://B/models/mini", host.keys, *FLAGS, curl=f'[ "$(grep -c ^curl {host.folder}/calls)" = 3 ]')
    assert done.returncode == 0, done.stderr
    folder, calls = host.folder / "data" / "checkpoints" / "B" / "models" / "mini", host.calls()
    assert f"python experiments/launch/fetch.py --source=gs://B/models/mini --out={folder}\n" in calls
    assert calls.count("--requirement experiments/launch/requirements.lock") == 1
    assert calls.index("daemon-reload") < calls.index("enable --quiet llada") < calls.index("restart llada")
    assert calls.count("http://localhost:8123/health") == 3
    keys = host.folder / "etc" / "keys"
    assert keys.read_text() == "sesame\n" and keys.stat().st_mode & 0o777 == 0o600
    lines = host.unit.read_text().splitlines()
    assert {"Restart=always", "RestartPreventExitStatus=2", "KillMode=mixed", "TimeoutStopSec=150"} <= set(lines)
    host("gs://B/models/mini", host.keys, *FLAGS)
    assert host.calls().count("--requirement") == 1  # installed already


def test_the_units_command_is_one_that_the_server_takes(host):
    assert host(str(host.folder), host.keys, *FLAGS).returncode == 0
    (line,) = [line for line in host.unit.read_text().splitlines() if line.startswith("ExecStart=")]
    python, tool, *arguments = shlex.split(line.removeprefix("ExecStart="))
    assert python == f"{host.folder}/app/.venv/bin/python" and f"--checkpoint={host.folder}" in arguments
    (done,) = run_all([[ROOT / tool, *arguments]])
    assert done.returncode == 2 and str(host.folder) in done.stderr and "Unknown" not in done.stderr


@pytest.mark.parametrize(
    "how, code, told",
    [
        ({"curl": "false", "systemctl": "true"}, 1, "the server is not healthy: journalctl --unit=llada_jax_serve"),
        ({"curl": "false", "SERVE_WAIT": "-1"}, 1, "is not healthy"),
        ({"python": 'case "$*" in *pip*) exit 1;; esac', "WORKER_TRIES": "2"}, 42, "install ended with 1, try 2 of 2"),
        ({"python": 'case "$*" in *fetch*) exit 2;; esac'}, 2, "error: gs://B/m: see the line above"),
    ],
)
def test_what_does_not_go_well_is_told(host, how, code, told):
    done = host("gs://B/m", host.keys, **how)
    assert done.returncode == code and told in done.stderr, done.stderr


@pytest.mark.parametrize("flag", ["--model_name=a b", "--x=$HOME", "--x=%h", '--x="', "--x=a\nExecStartPre=b"])
def test_what_systemd_would_take_for_something_else_is_refused(host, flag):
    done = host("gs://B/m", host.keys, flag)
    assert done.returncode == 2 and "a character that the unit" in done.stderr and not host.unit.exists()
    assert host("gs://B/m", "/nowhere/keys").returncode == 2


def test_the_balancer_waits_longer_than_the_servers():
    """Of nginx.conf, what goes with defaults of tools/serve.py."""
    text, flags = (
        (ROOT / "experiments" / "launch" / "nginx.conf").read_text(),
        (ROOT / "tools" / "serve.py").read_text(),
    )
    assert '"deadline", 600.0' in flags and "proxy_read_timeout 630s;" in text
    assert '"max_body", 4 << 20' in flags and "client_max_body_size 8m;" in text


def create(tmp_path, *arguments, there=False):
    """serve_vm.sh with a gcloud that writes down its calls and what it is sent."""
    gcloud = tmp_path / "gcloud"
    describe = f'[ "$4" != describe ] || exit {int(not there)}'
    take = f'case "$*" in *tar*) tar tz >{tmp_path}/sent;; esac'
    gcloud.write_text(f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/calls\n{describe}\n{take}\n')
    gcloud.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROJECT": "P", "ZONE": "Z"}
    script = str(ROOT / "experiments" / "launch" / "serve_vm.sh")
    done = subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True, timeout=60)
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_a_vm_is_created_sent_the_code_and_told_to_serve(tmp_path):
    (tmp_path / "keys").write_text("sesame\n")
    done, calls = create(tmp_path, "llada-1", "v6e-8", "gs://B/m", str(tmp_path / "keys"), "--max_rows=32")
    assert done.returncode == 0, done.stderr
    verbs = [call.removeprefix("compute tpus tpu-vm ").split()[0] for call in calls]
    assert verbs == ["describe", "create", "ssh", "scp", "ssh"]
    assert all("--project=P --zone=Z" in call for call in calls)
    assert "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e" in calls[1]
    assert "serve.sh gs://B/m ~/llada_jax.keys --max_rows=32" in calls[-1]
    sent = (tmp_path / "sent").read_text().split()
    assert {"tools/serve.py", "experiments/launch/requirements.lock", "pyproject.toml"} <= set(sent)
    _, calls = create(tmp_path, "llada-1", "v6e-8", "gs://B/m", str(tmp_path / "keys"), there=True)
    assert sum("tpu-vm create" in call for call in calls) == 1
    assert calls[-1].endswith("--command=cd /opt/llada_jax && sudo bash experiments/launch/serve.sh gs://B/m "
                              "~/llada_jax.keys --project=P --zone=Z")  # fmt: skip


def test_a_vm_that_cannot_be_is_not_asked_for(tmp_path):
    (tmp_path / "keys").write_text("sesame\n")
    for arguments in (("a", "h100-8", "gs://B/m", str(tmp_path / "keys")), ("a", "v6e-8", "gs://B/m", "/nowhere")):
        done, calls = create(tmp_path, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and not calls
