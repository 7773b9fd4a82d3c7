"""Launches training on TPUs that are not here: on queued TPU VMs through gcloud, or on GKE through XPK.

python experiments/launch/launch.py tpu_vm --name=mini --topology=v5p:4x4x4 --project=P --zone=Z --workdir=gs://B/mini \
    [--slices=N] [--spot] [--rows=gs://B/ROWS] [--action=ACTION] [--dry_run] -- --config=configs/wsd.py:llada2_mini ...
python experiments/launch/launch.py xpk --cluster=C ... the same

What follows -- are the trainer's flags. Every command is printed before it runs; --dry_run prints them and runs none.
Actions:
  create  (default) sends the code of the commit, installs from requirements.lock on each host, trains under
          supervise.sh, which starts a crashed trainer again; the trainer resumes from the workdir
  watch   tpu_vm: until the run has ended, creates machines that were taken back anew; then deletes them. On GKE the
          JobSet does so itself
  status  what the queue or the cluster says of the run
  logs    tpu_vm: the last lines of every host
  delete  ends it and gives the machines back; the trainer saves first, if it is given the time

The workdir lies on a bucket: all hosts must see it, and disks go with the machines. Before you pay for a slice:
python tools/rehearse.py --config=... --topology=... compiles the step for it. Not run against Google Cloud yet: the
commands are tested as text, the scripts that they start on this machine.
"""

import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from llada_jax import errors
from llada_jax.errors import InputError
from llada_jax.pod.chips import Topology, parse_topology

_NAME = flags.DEFINE_string("name", None, "Of the run: lower-case letters, digits and hyphens.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "A slice, e.g. v5p:4x4x4, v6e:16x16, tpu7x:4x4x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "How many of them, joined by the data-centre network.", lower_bound=1)
_PROJECT = flags.DEFINE_string("project", None, "Google Cloud project.")
_ZONE = flags.DEFINE_string("zone", None, "Its zone.")
_CLUSTER = flags.DEFINE_string("cluster", None, "xpk: the GKE cluster.")
_WORKDIR = flags.DEFINE_string("workdir", None, "gs://BUCKET/RUN: metrics, checkpoints, the code, logs of the hosts.")
_ROWS = flags.DEFINE_string("rows", "", "gs://BUCKET/ROWS: packed rows that every host copies to its disk.")
_SPOT = flags.DEFINE_bool("spot", False, "Machines that may be taken back.")
_RESERVED = flags.DEFINE_bool("reserved", False, "tpu_vm: machines of a reservation.")
_COMMIT = flags.DEFINE_string("commit", "HEAD", "The version of the code to run.")
_ALLOW_DIRTY = flags.DEFINE_bool("allow_dirty", False, "Run tracked files as they are, though not committed.")
_RUNTIME = flags.DEFINE_string("runtime_version", None, "tpu_vm: the machines' image. Default: the chip's.")
_IMAGE = flags.DEFINE_string("base_image", "python:3.11", "xpk: the Docker image that the code is put on.")
_ACTION = flags.DEFINE_enum("action", "create", ["create", "watch", "status", "logs", "delete"], "What to do.")
_POLL = flags.DEFINE_float("poll_seconds", 60.0, "watch: between looks at the queue.", lower_bound=0.0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, run none.")

ROOT = Path(__file__).resolve().parent.parent.parent
# cloud.google.com/tpu/docs/runtimes; tpu7x is served by GKE only.
RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
GRACE_SECONDS = 120  # for saving, once told to stop
_TAKEN_BACK = ("SUSPENDED", "FAILED")


# ---- what to launch


def code_version() -> str:
    """The commit to run. Raises InputError when the tree has changes that it would miss."""
    dirty = _git("status", "--porcelain", "--untracked-files=normal")
    if _COMMIT.value != "HEAD" or not dirty:
        return _git("rev-parse", "--verify", f"{_COMMIT.value}^{{commit}}")
    if not _ALLOW_DIRTY.value:
        raise InputError(f"{ROOT}: {dirty.splitlines()[0].strip()!r} is not committed; commit it, or --allow_dirty")
    for line in dirty.splitlines():
        if line.startswith("??"):
            print(f"# left behind, as git does not know it: {line[3:]}")
    return _git("stash", "create") or _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def check(platform: str, train_flags: Sequence[str]) -> Topology | None:
    """The slice to create, if one is. Raises InputError naming the flag that is missing or wrong."""
    creates = _ACTION.value in ("create", "watch")
    for flag in (_NAME, _PROJECT, _ZONE, *([_CLUSTER] if platform == "xpk" else []), *([_TOPOLOGY] if creates else [])):
        if not flag.value:
            raise InputError(f"--{flag.name} is required; see --help")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?", _NAME.value):
        raise InputError(f"--name={_NAME.value}, expected lower-case letters, digits and hyphens, 39 at most")
    if platform == "xpk" and _ACTION.value in ("watch", "logs"):
        raise InputError(f"--action={_ACTION.value}: of tpu_vm; GKE starts pods again itself, and keeps their logs")
    if not creates:
        return None
    topology = parse_topology(_TOPOLOGY.value)
    if platform == "tpu_vm" and topology.chip.name not in RUNTIMES:
        raise InputError(f"--topology={topology.name}: GKE alone serves {topology.chip.name}; launch it with xpk")
    if not re.fullmatch(r"gs://[^/]+/.*[^/]", _WORKDIR.value or ""):
        raise InputError(f"--workdir={_WORKDIR.value}, expected gs://BUCKET/RUN: all hosts must see it")
    if _ROWS.value and not _ROWS.value.startswith("gs://"):
        raise InputError(f"--rows={_ROWS.value}, expected gs://BUCKET/ROWS")
    _check_training(train_flags)
    return topology


def _check_training(train_flags: Sequence[str]) -> None:
    """What the trainer would refuse at once is refused here, where it costs nothing."""
    if not any(flag.startswith("--config=") for flag in train_flags):
        raise InputError("the trainer's flags follow --, as in -- --config=configs/wsd.py:llada2_mini")
    if any(flag.partition("=")[0] == "--workdir" for flag in train_flags):
        raise InputError("--workdir: before the --, not among the trainer's flags")
    import jax

    jax.config.update("jax_platforms", "cpu")
    from llada_jax import config_flag
    from llada_jax.training import config as settings

    try:
        config = config_flag.load(config_flag.config_arguments(train_flags))
    except InputError as error:
        raise InputError(f"the trainer's flags: {error}") from error
    settings.check(config)
    if not (_ROWS.value or config.data.path or config.data.cache):
        raise InputError("--rows or --config.data.path: a run on a bucket needs packed rows")


# ---- commands


class Runner:
    """Prints commands, and runs them unless it is a dry run."""

    def __call__(self, *command: str, may_fail: bool = False) -> None:
        print(shlex.join(command) + ("   # may fail" if may_fail else ""), flush=True)
        if not _DRY_RUN.value and subprocess.run(command, cwd=ROOT).returncode and not may_fail:
            raise InputError(f"{command[0]} failed: {shlex.join(command)}")

    def ask(self, *command: str) -> str:
        """What the command prints; "" when it fails."""
        print(shlex.join(command), flush=True)
        return (
            "" if _DRY_RUN.value else subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        )


def _write(path: Path, text: str) -> None:
    print(f"cat > {path.relative_to(ROOT)} <<'END'\n{text}END", flush=True)
    if not _DRY_RUN.value:
        path.write_text(text)


def _worker(train_flags: Sequence[str]) -> list[str]:
    return ["bash", "experiments/launch/worker.sh", _WORKDIR.value, _ROWS.value, *train_flags]


def _folder(run: Runner) -> Path:
    folder = ROOT / "runs" / "launch" / _NAME.value
    run("mkdir", "-p", str(folder.relative_to(ROOT)))
    return folder


# ---- TPU VMs


def tpu_vm(topology: Topology, train_flags: Sequence[str]) -> int:
    run = Runner()
    place = [f"--project={_PROJECT.value}", f"--zone={_ZONE.value}"]
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    name = _NAME.value
    delete = [*queue, "delete", name, *place, "--force", "--quiet"]
    if _ACTION.value == "status":
        run(*queue, "describe", name, *place)
    elif _ACTION.value == "delete":
        run(*delete)
    elif _ACTION.value == "logs":
        for node in _nodes():
            command = "tail -n 20 /tmp/llada_jax/train.log"
            run("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *place, "--worker=all", f"--command={command}")
    else:
        create, state = [*queue, "create", name, *place, *_request(topology)], ""
        describe = [*queue, "describe", name, *place, "--format=value(state.state)"]
        if _ACTION.value == "watch":
            state = run.ask(*describe)
        if not state:  # not queued yet
            _send(run, train_flags)
            run(*create)
        elif not (ROOT / _startup_file()).exists():
            raise InputError(f"{_startup_file()}: not here; watch a run where you created it")
        if _ACTION.value == "watch":
            return _watch(run, describe, delete, create)
    return 0


def _nodes() -> list[str]:
    return [_NAME.value] if _SLICES.value == 1 else [f"{_NAME.value}-{i}" for i in range(_SLICES.value)]


def _startup_file() -> Path:
    return Path("runs") / "launch" / _NAME.value / "startup.sh"


def _request(topology: Topology) -> list[str]:
    if topology.is_the_only_one:
        shape = [f"--accelerator-type={topology.accelerator_type}"]
    else:
        shape = [f"--type={topology.chip.name}", f"--topology={'x'.join(map(str, topology.shape))}"]
    several = [f"--node-count={_SLICES.value}", f"--node-prefix={_NAME.value}"]
    return [
        *shape,
        f"--runtime-version={_RUNTIME.value or RUNTIMES[topology.chip.name]}",
        *(several if _SLICES.value > 1 else [f"--node-id={_NAME.value}"]),
        *(["--spot"] if _SPOT.value else []),
        *(["--reserved"] if _RESERVED.value else []),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        f"--metadata-from-file=startup-script={_startup_file()}",
    ]


def _send(run: Runner, train_flags: Sequence[str]) -> None:
    """The code goes to the bucket, where a machine finds it at each boot: the first, or one after it was taken back."""
    commit = code_version()
    folder = _folder(run).relative_to(ROOT)
    archive = f"{folder}/{commit}.tar.gz"
    code = f"{_WORKDIR.value}/code/{commit}.tar.gz"
    run("git", "archive", "--format=tar.gz", f"--output={archive}", commit)
    run("gcloud", "storage", "cp", archive, code)
    run("gcloud", "storage", "rm", "--recursive", f"{_WORKDIR.value}/hosts/**", may_fail=True)  # ends of other launches
    unit = ["systemd-run", "--unit=llada_jax", "--setenv=HOME=/root", "--working-directory=/opt/llada_jax"]
    unit += ["--property=KillMode=mixed", f"--property=TimeoutStopSec={GRACE_SECONDS}", *_worker(train_flags)]
    _write(
        ROOT / _startup_file(),
        "#!/usr/bin/env bash\n"
        "# Every host runs this as root at each boot.\n"
        "set -euo pipefail\n"
        "mkdir -p /opt/llada_jax\n"
        f"gcloud storage cat {shlex.quote(code)} | tar xz -C /opt/llada_jax\n"
        f"{shlex.join(unit)}\n",
    )


def _watch(run: Runner, describe: list[str], delete: list[str], create: list[str]) -> int:
    """Until the run has ended: 0 when it has finished on every host that says so."""
    ends = ["gcloud", "storage", "cat", f"{_WORKDIR.value}/hosts/*.exit_code"]
    while True:
        if _DRY_RUN.value:
            print(
                f"# every {_POLL.value:g} s; when it is {' or '.join(_TAKEN_BACK)}: delete, create; once it has ended:"
            )
        state = run.ask(*describe)
        if state in _TAKEN_BACK:
            print(f"{state}: queueing again", flush=True)
            run(*delete)
            run(*create)
        elif _DRY_RUN.value or run.ask(*ends):
            time.sleep(_POLL.value if not _DRY_RUN.value else 0)  # the other hosts are about to end too
            codes = run.ask(*ends).split()
            run(*delete)
            print(f"# ended; logs: {_WORKDIR.value}/hosts", flush=True)
            return int(any(code != "0" for code in codes))
        time.sleep(_POLL.value)


# ---- GKE


def xpk(topology: Topology, train_flags: Sequence[str]) -> int:
    run = Runner()
    where = [f"--cluster={_CLUSTER.value}", f"--project={_PROJECT.value}", f"--zone={_ZONE.value}"]
    if _ACTION.value == "status":
        run("xpk", "workload", "list", *where, f"--filter-by-job={_NAME.value}")
    elif _ACTION.value == "delete":
        run("xpk", "workload", "delete", f"--workload={_NAME.value}", *where)
    else:
        commit = code_version()
        folder = _folder(run).relative_to(ROOT)
        run("git", "archive", "--format=tar", f"--output={folder}/{commit}.tar", commit)
        run("mkdir", "-p", f"{folder}/{commit}")
        run("tar", "--extract", f"--file={folder}/{commit}.tar", f"--directory={folder}/{commit}")
        kind = topology.accelerator_type
        if not topology.is_the_only_one:
            kind = f"{kind.rpartition('-')[0]}-{'x'.join(map(str, topology.shape))}"
        run(
            "xpk", "workload", "create", f"--workload={_NAME.value}", *where, f"--tpu-type={kind}",
            f"--num-slices={_SLICES.value}", *(["--spot"] if _SPOT.value else []),
            f"--base-docker-image={_IMAGE.value}", f"--script-dir={folder}/{commit}", "--max-restarts=1000",
            f"--termination-grace-period-seconds={GRACE_SECONDS}",
            # exec: XPK passes SIGTERM to the process that it started.
            f"--command=exec {shlex.join(_worker(train_flags))}",
        )  # fmt: skip
    return 0


PLATFORMS = {"tpu_vm": tpu_vm, "xpk": xpk}


def main(argv) -> int:
    platform, train_flags = argv[1], argv[2:]
    return PLATFORMS[platform](check(platform, train_flags), train_flags)


if __name__ == "__main__":
    errors.run(main, commands=tuple(PLATFORMS), more=True)
