"""Rewards of answers, given by worker processes: a reward that fails, hangs or dies costs its answer, not the run.

A reward is named by a string:

    task               the question's own score: reasoning-gym's scorer, or a JSONL row's "answer" or "pattern"
    code               the answer's program against the row's "tests" (evaluation/programs.py)
    MODULE:FUNCTION    the user's, FUNCTION(question: dict, answer: str) -> number
    FILE.py:FUNCTION   the same, by its file

The dict is the question's record: the JSONL row, or {"question", "answer", "entry"} of reasoning-gym.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from typing import NamedTuple, Protocol

import numpy as np

from llada_jax.errors import InputError, check_range
from llada_jax.evaluation.questions import Question

_START_SECONDS = 120.0  # the imports of the reward, on a machine that is busy
_STARTS = 3  # of one worker after another that none survives
_PIPE_SECONDS = 20  # that a worker may keep a message waiting; far more than one takes
_GRACE_SECONDS = 5.0  # for the fence, which has a limit of its own, to start and to end
_WORKER = "import sys; sys.path[:] = {path!r}; from llada_jax.reinforcement.reward_worker import main; main({channel})"


class Source(Protocol):
    """What a pool needs to know of the questions: questions.Questions has it. scoring: that of every question."""

    scoring: dict

    def question(self, number: int) -> Question: ...


class Fault(NamedTuple):
    """An answer that the reward gave no finite number. number: of the question. question: what it asks."""

    number: int
    question: str
    answer: str
    what: str

    def __str__(self) -> str:
        asked = " ".join(self.question.split())
        return f"question {self.number} ({asked if len(asked) <= 60 else asked[:59] + '…'}): the reward {self.what}"


class Scored(NamedTuple):
    """rewards [pairs] float64, in the order of the pairs; faults, in that order too."""

    rewards: np.ndarray
    faults: list[Fault]


class RewardPool:
    """Worker processes that score answers; a context manager, and to be used by one thread at a time.

    Opening it waits until every worker has loaded the reward. Raises InputError in one line if `reward` names nothing,
    if its code cannot be imported, or if another value is out of range.

    seconds: what an answer may take; then its worker is killed, with all that it started, and replaced. (For "code":
    processor time, and twice that in all; a program that takes longer is wrong, which is no fault of the reward.)
    default: the reward of an answer to which the reward gives no finite number. What a reward prints goes nowhere.
    """

    def __init__(
        self, questions: Source, reward: str = "task", seconds: float = 10.0, default: float = 0.0, workers: int = 2
    ):
        check_range("reward seconds", seconds, above=0)
        check_range("reward default", default)
        check_range("reward workers", workers, at_least=1)
        _check_name(reward, questions.scoring)
        self._questions, self._default, self._seconds = questions, float(default), float(seconds)
        scoring = questions.scoring
        if "tests" in scoring and ":" not in reward:
            fenced = max(1, round(seconds))
            scoring, self._seconds = scoring | {"tests": fenced}, 2 * fenced + _GRACE_SECONDS
        self._told = reward, scoring
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        with self._closed_on_error():
            for _ in range(int(workers)):
                self._workers.append(_Worker(self._told))
            while any(worker.is_starting for worker in self._workers):
                self._events()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers and what they have started."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def score(self, pairs: Sequence[tuple[int, str]]) -> Scored:
        """The rewards of (number of a question, answer). Raises InputError if the reward can no longer be loaded."""
        if not self._workers:
            raise RuntimeError("the pool is closed")
        rewards, faults = np.full(len(pairs), self._default), {}
        waiting, left = deque(range(len(pairs))), len(pairs)
        with self._closed_on_error():
            while left:
                for worker in self._workers:
                    if waiting and worker.is_idle:
                        place = waiting.popleft()
                        number, answer = pairs[place]
                        worker.give(place, self._questions.question(int(number)).record, answer, self._seconds)
                for place, value, what in self._events():
                    left -= 1
                    if value is None:
                        number, answer = pairs[place]
                        faults[place] = Fault(int(number), self._questions.question(int(number)).asks(), answer, what)
                    else:
                        rewards[place] = value
        return Scored(rewards, [faults[place] for place in sorted(faults)])

    def _events(self) -> list[tuple[int, float | None, str]]:
        """Waits until some worker has started, answered, died or run out of time. Returns (place, value, what) of the
        answers that are done. Workers that ended are replaced.
        """
        active = [worker for worker in self._workers if not worker.is_idle]
        wait = max(0.0, min(worker.deadline for worker in active) - time.monotonic())
        ready = connection.wait([worker.channel for worker in active], wait)
        done = []
        for worker in active:
            if worker.channel not in ready and time.monotonic() < worker.deadline:
                continue
            started = not worker.is_starting
            place, reply = worker.place, worker.receive() if worker.channel in ready else None
            if reply is not None and started:
                done.append((place, *reply))
            elif reply is not None:
                self._failed_starts = 0
            else:
                what = worker.death(self._seconds)
                self._workers[self._workers.index(worker)] = _Worker(self._told)
                if started:
                    done.append((place, None, what))
                else:
                    self._count_failed_start(what)
        return done

    def _count_failed_start(self, what: str) -> None:
        self._failed_starts += 1
        if self._failed_starts == _STARTS:
            raise InputError(f"reward={self._told[0]!r}: {_STARTS} workers did not start: the last {what}")

    @contextlib.contextmanager
    def _closed_on_error(self):
        try:
            yield
        except BaseException:
            self.close()
            raise


def _check_name(reward: str, scoring: dict) -> None:
    place, colon, name = reward.rpartition(":") if isinstance(reward, str) else ("", "", "")
    if not (place and name.isidentifier() if colon else reward in ("task", "code")):
        raise InputError(f"reward={reward!r}, expected task, code, MODULE:FUNCTION or FILE.py:FUNCTION")
    if reward == "code" and "tests" not in scoring:
        raise InputError('reward="code" needs questions with "tests"')


class _Worker:
    """A process that runs reward_worker.main. place: of the answer that it scores. deadline: in time.monotonic()."""

    def __init__(self, told: tuple[str, dict]):
        self.channel, theirs = multiprocessing.Pipe()
        with socket.socket(fileno=os.dup(self.channel.fileno())) as ours:
            for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", _PIPE_SECONDS, 0))
        with theirs:
            # Not multiprocessing's: a fork may copy a lock that a thread of JAX holds, and a spawn runs the main module
            # of this process again, with its imports.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER.format(path=[*map(str, sys.path)], channel=theirs.fileno())],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),), start_new_session=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a reward may use JAX; the accelerators are the trainer's
            )  # fmt: skip
        self._reward = told[0]
        self.is_starting, self.place, self.deadline = True, None, time.monotonic() + _START_SECONDS
        self._send(told)

    @property
    def is_idle(self) -> bool:
        return not self.is_starting and self.place is None

    def give(self, place: int, record: dict, answer: str, seconds: float) -> None:
        self.place, self.deadline = place, time.monotonic() + seconds
        self._send((record, answer))

    def _send(self, message) -> None:
        with contextlib.suppress(OSError):  # it has died, or hangs: `receive` or the deadline will find that
            self.channel.send(message)

    def receive(self) -> tuple | None:
        """(value, what) of its answer, or () when it has started; None if it has died. Raises InputError if it cannot
        load the reward.
        """
        try:
            first, *rest = self.channel.recv()
        except (EOFError, OSError):
            return None
        if first == "unusable":
            raise InputError(f"reward={self._reward!r}: {rest[0]}")
        self.is_starting, self.place = False, None
        return tuple(rest)

    def death(self, seconds: float) -> str:
        """Ends it and says what happened to it."""
        if time.monotonic() >= self.deadline:
            self.end()
            return f"took more than {_START_SECONDS if self.is_starting else seconds:g} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # it has closed its channel: most likely it is about to end
        code = self._process.returncode
        self.end()
        if code is None:
            return "closed its channel"
        if code >= 0:
            return f"ended its process with exit code {code}"
        hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        return f"ended its process by {signal.Signals(-code).name}{hint}"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it started, too
        self._process.stdin.close()
        self.channel.close()
        self._process.wait()
