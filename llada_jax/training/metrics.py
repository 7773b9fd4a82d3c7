"""Metrics to the console, to metrics.jsonl and to TensorBoard event files."""

import json
import math
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from llada_jax.diffusion.schedule import Phase


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl and event files; on resume, rows of later steps are dropped first.

    Of several processes only process 0 writes.
    """

    def __init__(self, workdir: Path, resume_step: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        _truncate(self._path, resume_step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir), purge_step=resume_step + 1)

    def write(self, row: dict, prefix: str) -> None:
        """row: "step" and scalars; prefix: the TensorBoard group."""
        if not self._writes:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._events.add_scalar(f"{prefix}/{name}", value, row["step"])

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        self._events.close()


def _truncate(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (row := _row(line)) is not None and row["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a killed run


class Progress:
    """Throughput and time left of a run; `line` is what the console shows."""

    def __init__(self, first_step: int, last_step: int, clean_tokens_per_step: int):
        self._last_step, self._tokens = last_step, clean_tokens_per_step
        self._marks = [(first_step, time.perf_counter())]

    def line(self, step: int, phase: Phase, metrics: dict) -> tuple[str, float]:
        """The console line and clean tokens a second since the last line."""
        before, then = self._marks[-1]
        now = time.perf_counter()
        self._marks = self._marks[-5:] + [(step, now)]
        rate = (step - before) * self._tokens / max(now - then, 1e-9)
        oldest_step, oldest = self._marks[0]
        left = (self._last_step - step) * (now - oldest) / max(step - oldest_step, 1)
        accuracy = metrics.get("masked_accuracy", metrics.get("preference_accuracy"))
        text = (
            f"step {step}/{self._last_step}  {phase.name}  block {phase.block_size}  loss {metrics['loss']:.4f}  "
            f"acc {accuracy:.3f}  {rate:,.0f} tokens/s  {duration(left)} left"
        )
        return text, rate


def duration(seconds: float) -> str:
    seconds = math.ceil(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
