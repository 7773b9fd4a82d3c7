"""Goodput: the share of a run's wall time spent in useful steps, and what took the rest, over all restarts.

    start      reading the config, opening data, drawing or loading the first weights
    restore    reading the checkpoint from which a restarted run resumes
    compile    the first step of each kind of pass
    data       waiting for rows while the devices are idle
    evaluate   held-out scores
    save       copying a checkpoint off the devices, and waiting for the previous save
    profile    starting and writing traces
    redone     steps that an earlier start did, but did not save
    down       between the last record of one start and the next start
    step       everything else: the useful steps

The record is WORKDIR/goodput.json, written with each row of metrics. Devices run behind the host, so any other activity
is timed from when the steps before it are done.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

LOST = ("start", "restore", "compile", "data", "evaluate", "save", "profile", "redone", "down")
FILE = "goodput.json"


class Goodput:
    """Attributes: `seconds`, {"step" or one of LOST: seconds so far}, summed over all starts.

    clock: monotonic seconds; wall: seconds since the epoch. Only a process with `writes` writes the record. A damaged
    record is replaced.
    """

    def __init__(
        self,
        workdir: Path,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        writes: bool = True,
    ):
        self._path, self._clock, self._wall, self._writes = workdir / FILE, clock, wall, writes
        record = _read(self._path)
        self.seconds = {name: record.get("wall_seconds", {}).get(name, 0.0) for name in ("step", *LOST)}
        self._furthest = record.get("furthest_step", 0)  # of any start
        if record:
            self.seconds["down"] += max(0.0, wall() - record["written"])  # clocks may be set back
        self._begun = clock()
        self._apart = 0.0  # seconds since _begun that are not spent in steps
        self._step = 0
        self._pending = None  # metrics of the last step: they are there when it is done

    @property
    def share(self) -> float:
        """The share of the wall time since the first start that was spent in useful steps."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    @contextlib.contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Counts the time of the body as `name`, from when the steps before it are done."""
        jax.block_until_ready(self._pending)
        begun = self._clock()
        try:
            yield
        finally:
            self._add(name, self._clock() - begun)

    def begin_steps(self, step: int) -> None:
        """Call when `step` steps are done and the next one is about to run; uncounted time so far becomes "start"."""
        self._add("start", self._clock() - self._begun - self._apart)
        self._begun, self._apart, self._step = self._clock(), 0.0, step

    def timed_steps(self, train_step: Callable) -> Callable:
        """Wraps train_step(..., halves) -> (state, metrics); the first call per `halves` counts as "compile"."""
        compiled = set()

        def step(*arguments):
            if arguments[-1] in compiled:
                state, self._pending = train_step(*arguments)
                return state, self._pending
            with self.spent("compile"):
                state, self._pending = train_step(*arguments)
                jax.block_until_ready(self._pending)
            compiled.add(arguments[-1])
            return state, self._pending

        return step

    def timed_batches(self, batches: Iterator) -> Iterator:
        """Yields `batches`; waiting for one counts as "data" if the devices were idle when it came."""
        while True:
            begun = self._clock()
            batch = next(batches, None)
            if all(x.is_ready() for x in jax.tree.leaves(self._pending)):
                self._add("data", self._clock() - begun)
            if batch is None:
                return
            yield batch

    def mark(self, step: int) -> float:
        """Call when `step` steps are done: counts the time since the last mark and writes the record.

        Returns the mean seconds per step since then, 0 without a step.
        """
        jax.block_until_ready(self._pending)
        now = self._clock()
        steps, seconds = step - self._step, max(0.0, now - self._begun - self._apart)
        again = min(max(self._furthest - self._step, 0), steps)
        redone = seconds * again / steps if steps else 0.0
        self.seconds["redone"] += redone
        self.seconds["step"] += seconds - redone
        self._begun, self._apart, self._step = now, 0.0, step
        self._furthest = max(self._furthest, step)
        self._write()
        return seconds / steps if steps else 0.0

    def fields(self) -> dict:
        """Fields of a metrics row: the share, and the seconds of each kind so far."""
        return {
            "goodput": round(self.share, 4),
            "wall_seconds": {name: round(s, 3) for name, s in self.seconds.items()},
        }

    def _write(self) -> None:
        if self._writes:
            record = {"furthest_step": self._furthest, "written": self._wall()} | self.fields()
            temporary = self._path.with_name(f"{FILE}.partial")
            temporary.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(temporary, self._path)

    def describe(self) -> str:
        total = max(sum(self.seconds.values()), 1e-9)
        lost = sorted(((self.seconds[name], name) for name in LOST), reverse=True)
        rest = ", ".join(f"{name} {value / total:.1%}" for value, name in lost if value / total >= 0.0005)
        return f"goodput {self.share:.1%} of {total:,.0f} s" + (f"; the rest: {rest}" if rest else "")

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self._apart += seconds


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
        float(record["written"]), int(record["furthest_step"]), dict(record["wall_seconds"])
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return {}
