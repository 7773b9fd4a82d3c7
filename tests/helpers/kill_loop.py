"""Kills a trainer at random moments and starts it again until it ends by itself; compares what two runs leave.

A trainer is a list of processes: one, or all those of a distributed run. `start` begins one life of it:

    def start():
        return [spawn(["--config=...", f"--workdir={workdir}"], log)]

    tally = run_killed(start, workdir, random.Random(0), kills=10)
    assert_same_end(workdir, uninterrupted)
"""

import dataclasses
import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llada_jax.monitoring.metrics import TIMED
from llada_jax.runtime import distributed
from tests.helpers.command_lines import Process
from tests.helpers.environment import process_environment

TRAINER = Path(__file__).with_name("paced_trainer.py")
# How processes end when another is struck: all save and stop, one says that the other is gone, or JAX does.
ENDED_WITH_THEM = {0, distributed.LOST_PEER, -signal.SIGABRT}


@dataclasses.dataclass
class Tally:
    """What happened to a trainer. kills: by SIGKILL; terms: by SIGTERM; saving: of both, those that came while a step
    was being saved; codes: how often a struck process ended with which exit status; lost: lives that were not struck in
    which the processes lost each other, as on a machine too busy for gloo, which waits 30 seconds.
    """

    lives: int = 0
    kills: int = 0
    terms: int = 0
    saving: int = 0
    lost: int = 0
    codes: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def strikes(self) -> int:
        return self.kills + self.terms

    def add(self, other: "Tally") -> None:
        for name in ("lives", "kills", "terms", "saving", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for code, count in other.codes.items():
            self.codes[code] = self.codes.get(code, 0) + count


def spawn(arguments: Sequence[str], log: Path, pace: float = 0.0) -> Process:
    """Starts llada_jax.train on one fake CPU device, its output appended to `log`. pace: least seconds of a step."""
    return Process([TRAINER, *arguments], process_environment(PACE=str(pace)), log, log)


def run_to_end(start: Callable[[], list[Process]], seconds: float = 300) -> None:
    """One life without a kill. Raises AssertionError unless every process exits 0."""
    codes = _wait(start(), seconds)
    assert set(codes) == {0}, f"exit codes {codes}"


def run_killed(
    start: Callable[[], list[Process]],
    workdir: Path,
    chooser: random.Random,
    kills: int,
    victims: Callable[[list], list] = lambda processes: processes,
    longest: float = 2.0,
    seconds: float = 300,
) -> Tally:
    """Starts the trainer until it ends by itself with exit code 0, struck in up to `kills` of its lives.

    A strike is SIGKILL or SIGTERM, at a random moment of the start, up to `longest` seconds after a new row of metrics,
    or while a step is being saved. victims: of the processes, those that are struck; the others must end by themselves.
    Raises AssertionError when a struck process ends otherwise than such signals let it, an unstruck trainer does not
    exit 0, or a life takes more than `seconds`.
    """
    tally, started_in = Tally(), 5.0
    while True:
        begun = time.monotonic()
        processes = start()
        tally.lives += 1
        try:
            if tally.strikes < kills:
                aim = chooser.choice(("start", "step", "step", "save"))
                struck, saving = victims(processes), False
                if aim == "start":
                    reached = _alive_for(processes, chooser.uniform(0, started_in))
                elif aim == "step":
                    reached = _until(processes, _grows(workdir / "metrics.jsonl"), seconds)
                    started_in = max(started_in, time.monotonic() - begun)
                    reached = reached and _alive_for(processes, chooser.uniform(0, longest))
                else:
                    reached = _until(processes, lambda: _being_saved(workdir), seconds)
                    reached = saving = reached and _alive_for(processes, chooser.uniform(0, 0.1))
                if reached:
                    number = chooser.choice((signal.SIGKILL, signal.SIGTERM))
                    for process in struck:
                        process.send_signal(number)
                    _wait(processes, seconds)
                    tally.saving += saving
                    _count(tally, number, [process.returncode for process in struck])
                    left = {process.returncode for process in processes if process not in struck}
                    assert left <= ENDED_WITH_THEM, f"exit codes {left} of those that were not struck"
                    continue
            codes = _wait(processes, seconds)
            if distributed.LOST_PEER in codes and set(codes) <= ENDED_WITH_THEM and tally.lost < 10:
                tally.lost += 1
                continue
            assert set(codes) == {0}, f"exit codes {codes} of a life that was not struck"
            return tally
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def assert_same_end(workdir: Path, uninterrupted: Path) -> None:
    """Two runs end in the same bits (weights, optimizer, trainer's values) and have the same metrics."""
    ends = [max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
            for run in (workdir, uninterrupted)]  # fmt: skip
    assert ends[0] == ends[1]
    ours, theirs = (run / "checkpoints" / str(ends[0]) for run in (workdir, uninterrupted))
    digests = [json.loads((step / "digests.json").read_text())["tensors"] for step in (ours, theirs)]
    assert digests[0] == digests[1] and digests[0]["params"] and digests[0]["optimizer"]
    assert (ours / "train_state.json").read_text() == (theirs / "train_state.json").read_text()
    assert metrics_of(workdir) == metrics_of(uninterrupted)
    left = [path.name for path in (workdir / "checkpoints").iterdir() if not (path / "digests.json").exists()]
    assert not left, f"left behind: {left}"


def metrics_of(workdir: str | Path) -> list[dict]:
    """Rows of metrics.jsonl without the fields that measure time."""
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def _count(tally: Tally, number: int, codes: list[int]) -> None:
    """SIGTERM saves and exits 0, or ends a trainer that has not begun to train, or has ended training."""
    allowed = {0, -number}  # 0 after SIGKILL: it had just ended
    assert set(codes) <= allowed, f"exit codes {codes} after signal {number}"
    if number == signal.SIGKILL:
        tally.kills += 1
    else:
        tally.terms += 1
    for code in codes:
        tally.codes[code] = tally.codes.get(code, 0) + 1


def _wait(processes: list[Process], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    return [process.wait(max(0.1, end - time.monotonic())) for process in processes]


def _until(processes: list[Process], condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true before a process ended."""
    end = time.monotonic() + seconds
    while not condition():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() < end, f"no progress in {seconds} s"
        time.sleep(0.001)
    return True


def _alive_for(processes: list[Process], seconds: float) -> bool:
    end = time.monotonic() + seconds
    _until(processes, lambda: time.monotonic() >= end, seconds + 60)
    return all(process.poll() is None for process in processes)


def _grows(path: Path) -> Callable[[], bool]:
    """Whether the file has grown since it was last looked at; a resumed run makes it shorter first."""
    seen = [_size(path)]

    def condition() -> bool:
        before, seen[0] = seen[0], _size(path)
        return seen[0] > before

    return condition


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _being_saved(workdir: Path) -> bool:
    try:
        return any(".partial" in path.name for path in (workdir / "checkpoints").iterdir())
    except FileNotFoundError:
        return False
