"""Writes metrics to the console, to metrics.jsonl and to TensorBoard event files."""

import json
import math
import os
import sys
import time
from pathlib import Path

import jax
from etils import epath

from llada_jax.diffusion.schedule import Phase
from llada_jax.errors import InputError
from llada_jax.monitoring.tensorboard import Events
from llada_jax.runtime.retry import Retry

# Fields that depend on the machine and the moment; a resumed run repeats all others bit for bit.
TIMED = frozenset(
    {"tokens_per_second", "mfu", "goodput", "wall_seconds", "hbm_bytes", "hbm_peak_bytes"}
    | {f"seconds_{part}" for part in ("answers", "rewards", "updates")}
)


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl and event files; on resume, rows of later steps are dropped first.

    With several processes, only process 0 writes.
    """

    def __init__(self, workdir: Path, resume_step: int, retry: Retry = Retry()):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        drop_later_rows(self._path, resume_step)
        self._retry = retry
        self._file = open(self._path, "ab", buffering=0)
        self._events = Events(workdir, purge_step=resume_step + 1)

    def write(self, row: dict, prefix: str) -> None:
        """row: "step", scalars, and groups {name: scalar}. prefix: the TensorBoard group of the scalars.

        A loss is also written to a group per phase and block size. Raises InputError if the store fails too long.
        """
        if not self._writes:
            return
        self._append(json.dumps(row).encode() + b"\n")
        scalars = {f"{prefix}/{name}": value for name, value in row.items() if name != "step"}
        if "loss" in row and "phase" in row:
            scalars[f"loss_by_phase/{row['phase']}_block_{row['block_size']}"] = row["loss"]
        for name, group in row.items():
            if isinstance(group, dict):
                scalars |= {f"{name}/{part}": value for part, value in group.items()}
        for name, value in scalars.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, row["step"])

    def _append(self, data: bytes) -> None:
        left = memoryview(data)

        def push():  # goes on where it failed
            nonlocal left
            while left:
                left = left[self._file.write(left) :]
            self._events.flush()

        self._retry.attempt(push, self._path)

    def sync(self) -> None:
        """Flushes the rows to the disk: a checkpoint must not outlive the rows of its steps."""
        if not self._writes:
            return
        self._retry.attempt(self._events.flush, self._path.parent)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        try:
            self._events.close()
        except OSError as error:
            print(f"{self._path.parent}: the last points for TensorBoard are lost ({error})", file=sys.stderr)


def read_rows(workdir: str | os.PathLike) -> list[dict]:
    """The rows of WORKDIR/metrics.jsonl. Raises InputError if there are none."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the metrics of a run")
    rows = [row for line in path.read_text().splitlines() if (row := _row(line)) is not None]
    if not rows:
        raise InputError(f"{path}: no rows yet")
    return rows


def drop_later_rows(path: Path, step: int) -> None:
    """Leaves the lines of a JSONL file with "step" up to `step`, and none that is half written."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        earlier = [line for line in lines if (row := _row(line)) is not None and row["step"] <= step]
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text("".join(line + "\n" for line in earlier), encoding="utf-8")
        temporary.replace(path)  # at once: a run may be killed here too


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a killed run


class Progress:
    """Throughput and remaining time of a run, as a console line."""

    def __init__(self, first_step: int, last_step: int, clean_tokens_per_step: int):
        self._last_step, self._tokens = last_step, clean_tokens_per_step
        self._marks = [(first_step, time.perf_counter())]

    def line(self, step: int, phase: Phase, metrics: dict) -> tuple[str, float]:
        """Returns (the console line, clean tokens per second since the last line)."""
        before, then = self._marks[-1]
        now = time.perf_counter()
        self._marks = self._marks[-5:] + [(step, now)]
        rate = (step - before) * self._tokens / max(now - then, 1e-9)
        oldest_step, oldest = self._marks[0]
        left = (self._last_step - step) * (now - oldest) / max(step - oldest_step, 1)
        names = {"masked_accuracy": "acc", "preference_accuracy": "acc", "reward": "reward"}
        shown = "  ".join(f"{names[name]} {metrics[name]:.3f}" for name in names if name in metrics)
        text = (
            f"step {step}/{self._last_step}  {phase.name}  block {phase.block_size}  loss {metrics['loss']:.4f}  "
            f"{shown}  {rate:,.0f} tokens/s  {duration(left)} left"
        )
        return text, rate


def duration(seconds: float) -> str:
    seconds = math.ceil(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
