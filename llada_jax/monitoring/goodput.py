"""Goodput: the share of a run's wall time that went into useful steps, and where the rest went, over all restarts.

    start      reading the config, opening data, drawing or loading the first weights
    restore    reading the checkpoint that a restarted run goes on from
    compile    the first step of each kind of pass
    data       waiting for rows while the devices had nothing left to do
    evaluate   held-out scores
    save       copying a checkpoint off the devices, and waiting for the one before
    profile    beginning and writing traces
    redone     steps that an earlier start had done, but not saved
    down       between the last record of one start and the beginning of the next
    step       all other: the useful steps

The record is WORKDIR/goodput.json, written with each row of metrics. Devices work ahead of the host: whatever is not a
step begins when the steps before it are done, so that their time stays theirs.
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
    """Attributes: `seconds`, {"step" or one of LOST: so far}, of all starts together.

    clock: seconds that never go back; wall: seconds that all machines share. Only the process that `writes` keeps the
    record. A damaged record is begun anew.
    """

    def __init__(
        self,
        workdir: Path,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        writes: bool = True,
    ):
        self._path, self._clock, self._wall, self._writes = workdir / FILE, clock, wall, writes
        found = _read(self._path)
        self.seconds = {name: found.get("wall_seconds", {}).get(name, 0.0) for name in ("step", *LOST)}
        self._furthest = found.get("furthest_step", 0)  # that any start has done
        if found:
            self.seconds["down"] += max(0.0, wall() - found["written"])  # clocks may be set back
        self._begun = clock()
        self._apart = 0.0  # seconds since _begun that are not steps'
        self._step = 0
        self._pending = None  # metrics of the last step: they are there when it is done

    @property
    def share(self) -> float:
        """Of the wall time since the first start that went into useful steps."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    @contextlib.contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """What happens inside counts as `name`; it begins when the steps before it are done."""
        jax.block_until_ready(self._pending)
        begun = self._clock()
        try:
            yield
        finally:
            self._add(name, self._clock() - begun)

    def begin_steps(self, step: int) -> None:
        """`step` steps are done, and the next one is about to run: what was not told apart so far is the start's."""
        self._add("start", self._clock() - self._begun - self._apart)
        self._begun, self._apart, self._step = self._clock(), 0.0, step

    def timed_steps(self, train_step: Callable) -> Callable:
        """train_step(..., halves) -> (state, metrics), with its first call for each `halves` as "compile"."""
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
        """`batches`; a wait for the next one is "data" if the devices were done before it came."""
        while True:
            begun = self._clock()
            batch = next(batches, None)
            if all(x.is_ready() for x in jax.tree.leaves(self._pending)):
                self._add("data", self._clock() - begun)
            if batch is None:
                return
            yield batch

    def mark(self, step: int) -> float:
        """`step` steps are done: books the time since the last mark, and writes the record.

        Returns the mean seconds of a step since then, 0 if there was none.
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
        """Of a row of metrics: the share, and the seconds of each kind so far."""
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
        found = json.loads(path.read_text())
        float(found["written"]), int(found["furthest_step"]), dict(found["wall_seconds"])
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return {}
