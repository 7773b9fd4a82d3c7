"""SIGTERM announces a preemption: the run saves and ends, and the next one resumes.

With several processes one of them receives the signal, and JAX's coordination service chooses the step after which all
stop. Its signal handler is installed by jax.distributed.initialize.
"""

import contextlib
import signal
import sys

import jax
from jax.experimental import multihost_utils


class Stop:
    """is_set: the run must save and end now."""

    def __init__(self):
        self.is_set = False
        self._asked = 0

    def after_step(self) -> bool:
        """Whether to end after this step. Every process must ask after every step; all get the same answer."""
        if jax.process_count() > 1 and not self.is_set:
            self._asked += 1  # the service needs a count over all loops; step numbers may start again
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
