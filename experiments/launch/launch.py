"""Launches training on TPUs that are not here: on queued TPU VMs through gcloud, or on GKE through XPK.

python experiments/launch/launch.py tpu_vm --name=mini --topology=v5p:4x4x4 --project=P --zone=Z --workdir=gs://B/mini \
    [--slices=N] [--spot] [--rows=gs://B/ROWS] [--action=ACTION] [--dry_run] -- --config=configs/wsd.py:llada2_mini ...
python experiments/launch/launch.py xpk --cluster=C ... the same

What follows -- are the trainer's flags. Every command is printed before it runs; --dry_run prints them and runs none.
Actions:
  create  (default) sends the code of the commit, installs from requirements.lock on each host, trains under
          supervise.sh, which starts a crashed trainer again; the trainer resumes from the workdir. A host that cannot
          install or copy its rows tries again; bad input ends the run
  watch   tpu_vm: until the run has ended, creates machines that were taken back anew; then deletes them. On GKE the
          JobSet does so itself
  status  what the queue or the cluster says of the run
  logs    tpu_vm: the last lines of every host
  delete  ends it and gives the machines back; the trainer saves first, if it is given the time

The workdir lies on a bucket: all hosts must see it, and disks go with the machines. Before you pay for a slice:
python tools/rehearse.py --config=... --topology=... compiles the step for it. XPK is that of pip install xpk==1.16.0,
with kubectl, gcloud and crane. Not run against Google Cloud yet: gcloud's own parser and XPK's dry run take the
commands, and the scripts that they start run on this machine.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import slices
import trainer_flags
from absl import flags

from llada_jax import command_line
from llada_jax.chips import Topology, parse_topology
from llada_jax.errors import InputError

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
GRACE_SECONDS = 120  # for saving, once told to stop
AGAIN = (
    42  # how worker.sh ends when another try may go better; XPK 1.16 restarts 42 and 127 to 255, and ends a job on else
)
AGAIN_SECONDS = 30
_NOT_OF = {
    "tpu_vm": [(_CLUSTER, "clusters are of GKE"), (_IMAGE, "--runtime_version is the image of TPU VMs")],
    "xpk": [(_RESERVED, "the node pools are"), (_RUNTIME, "--base_image is the image of containers")],
}
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
    _check_platform(platform)
    if not creates:
        return None
    topology = parse_topology(_TOPOLOGY.value)
    slices.create_command(topology) if platform == "tpu_vm" else slices.xpk_type(topology)
    if not re.fullmatch(r"gs://[^/]+/.*[^/]", _WORKDIR.value or ""):
        raise InputError(f"--workdir={_WORKDIR.value}, expected gs://BUCKET/RUN: all hosts must see it")
    if _ROWS.value and not re.fullmatch(r"gs://[^/]+.*", _ROWS.value):
        raise InputError(f"--rows={_ROWS.value}, expected gs://BUCKET/ROWS")
    for flag in (_WORKDIR, _ROWS):
        if wrong := re.search(r"[\s*?\[\]]", flag.value):  # gcloud storage would take more files than one
            raise InputError(f"--{flag.name}={flag.value}: {wrong[0]!r} in the name of a folder")
        trainer_flags.check_text(f"--{flag.name}={flag.value}", flag.value)
    trainer_flags.check(train_flags, _ROWS.value)
    return topology


def _check_platform(platform: str) -> None:
    """Raises InputError on a flag that would count for nothing, and on two that exclude each other."""
    for flag, why in _NOT_OF[platform]:
        if flag.present:
            raise InputError(f"--{flag.name}: not of {platform}; {why}")
    if _SPOT.value and _RESERVED.value:
        raise InputError("--spot and --reserved exclude each other: a reservation is not taken back")
    if re.fullmatch(r"[a-z]+-[a-z]+\d+", _ZONE.value):
        raise InputError(f"--zone={_ZONE.value} is a region, expected a zone of it, such as {_ZONE.value}-a")


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
        create, state = [*slices.create_command(topology), name, *place, *_request(topology)], ""
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
    several = [f"--node-count={_SLICES.value}", f"--node-prefix={_NAME.value}"]
    return [
        *slices.shape_flags(topology),
        f"--runtime-version={_RUNTIME.value or slices.RUNTIMES[topology.chip.name]}",
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
    run("gcloud", "storage", "rm", f"{_WORKDIR.value}/hosts/**", may_fail=True)  # ends of other launches
    unit = ["systemd-run", "--unit=llada_jax", "--setenv=HOME=/root", "--working-directory=/opt/llada_jax"]
    unit += ["--property=KillMode=mixed", f"--property=TimeoutStopSec={GRACE_SECONDS}"]
    unit += ["--property=Restart=on-abnormal", f"--property=RestartForceExitStatus={AGAIN}"]
    unit += [f"--property=RestartSec={AGAIN_SECONDS}", *_worker(train_flags)]
    _write(
        ROOT / _startup_file(),
        "#!/usr/bin/env bash\n"
        "# Every host runs this as root at each boot.\n"
        "set -euo pipefail\n"
        "mkdir -p /opt/llada_jax\n"
        f"until gcloud storage cat {shlex.quote(code)} | tar xz -C /opt/llada_jax; do sleep {AGAIN_SECONDS}; done\n"
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
    cluster = [f"--cluster={_CLUSTER.value}", f"--project={_PROJECT.value}", f"--zone={_ZONE.value}"]
    if _ACTION.value == "status":
        run("xpk", "workload", "list", *cluster, f"--filter-by-job={_NAME.value}")
    elif _ACTION.value == "delete":
        run("xpk", "workload", "delete", f"--workload={_NAME.value}", *cluster)
    else:
        commit = code_version()
        folder = _folder(run).relative_to(ROOT)
        run("git", "archive", "--format=tar", f"--output={folder}/{commit}.tar", commit)
        run("mkdir", "-p", f"{folder}/{commit}")
        run("tar", "--extract", f"--file={folder}/{commit}.tar", f"--directory={folder}/{commit}")
        run(
            "xpk", "workload", "create", f"--workload={_NAME.value}", *cluster,
            f"--tpu-type={slices.xpk_type(topology)}", f"--num-slices={_SLICES.value}",
            *(["--spot"] if _SPOT.value else []),
            f"--base-docker-image={_IMAGE.value}", f"--script-dir={folder}/{commit}", "--max-restarts=1000",
            f"--termination-grace-period-seconds={GRACE_SECONDS}",
            # exec, no pipe, nothing behind it: XPK passes SIGTERM on to its sub-shell alone, which this replaces.
            f"--command=exec {shlex.join(_worker(train_flags))}",
        )  # fmt: skip
    return 0


PLATFORMS = {"tpu_vm": tpu_vm, "xpk": xpk}


def main(argv) -> int:
    platform, train_flags = argv[1], argv[2:]
    topology = check(platform, train_flags)
    program = {"tpu_vm": "gcloud", "xpk": "xpk"}[platform]
    if not _DRY_RUN.value and not shutil.which(program):
        raise InputError(f"{program} is not installed; --dry_run prints what would run")
    return PLATFORMS[platform](topology, train_flags)


if __name__ == "__main__":
    command_line.run(main, commands=tuple(PLATFORMS), more=True)
