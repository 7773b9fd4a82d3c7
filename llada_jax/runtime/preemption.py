"""SIGTERM, by which a machine is taken back: a run then saves and ends, and the next one goes on from there.

With several processes the signal comes to one of them; JAX's coordination service then names the step at which all of
them stop. Its handler of the signal is in place from jax.distributed.initialize on.
"""

import contextlib
import signal
import sys

import jax
from jax.experimental import multihost_utils


class Stop:
    """is_set: the run is to save and end now."""

    def __init__(self):
        self.is_set = False
        self._asked = 0

    def after_step(self) -> bool:
        """Whether to end after this step; every process asks after every step, and all get the same answer."""
        if jax.process_count() > 1 and not self.is_set:
            self._asked += 1  # counts over loops, as the service needs it; steps would start again
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.set()
        return self.is_set

    def set(self) -> None:
        self.is_set = True
        print("SIGTERM: saving a checkpoint", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_on_sigterm():
    """Yields a Stop that SIGTERM sets; the loop then saves and returns."""
    stop = Stop()
    if jax.process_count() > 1:
        yield stop
        return
    try:
        previous = signal.signal(signal.SIGTERM, lambda signum, frame: stop.set())
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
