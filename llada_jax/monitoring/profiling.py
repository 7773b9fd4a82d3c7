"""xprof traces of chosen steps: --config.profile.steps=10:13 writes WORKDIR/profile, for TensorBoard's profile plugin
or https://ui.perfetto.dev.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext

import jax

from llada_jax.errors import InputError


def parse_steps(text: str) -> range:
    """ "10:13" -> range(10, 13), numbered as in metrics.jsonl, from 1; "" -> an empty range. Raises InputError."""
    if not text:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise InputError(f"config.profile.steps={text!r}, expected FIRST:END, steps from 1, the last one END - 1")
    return range(int(first), int(end))


class Profile:
    """Traces the steps in `steps`, from when the step before them is done until the last one is done.

    A run that ends or is stopped in between keeps its partial trace. spent: Goodput.spent, for starting and writing.
    """

    def __init__(self, directory: str | os.PathLike, steps: range, spent: Callable = lambda name: nullcontext()):
        self._directory, self._steps, self._spent, self._tracing = str(directory), steps, spent, False

    def before(self, step: int, state) -> None:
        if step in self._steps and not self._tracing:
            jax.block_until_ready(state)
            with self._spent("profile"):
                jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, metrics) -> None:
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.close()
            print(f"traced steps {self._steps.start} to {step}: {self._directory}", flush=True)

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            with self._spent("profile"):
                jax.profiler.stop_trace()
