"""SIGTERM, by which a machine is taken back: a run then saves and ends, and the next one goes on from there."""

import contextlib
import signal
import sys


class Stop:
    is_set = False


@contextlib.contextmanager
def stop_on_sigterm():
    """Yields a flag that SIGTERM sets; the loop then saves and returns."""
    stop = Stop()

    def handler(signum, frame):
        stop.is_set = True
        print("SIGTERM: saving a checkpoint", file=sys.stderr, flush=True)

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
