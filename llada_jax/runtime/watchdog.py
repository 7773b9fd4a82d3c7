"""Ends a run that hangs: a supervisor can restart a process that has exited, not one that waits for ever."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_CODE = 75  # EX_TEMPFAIL: another attempt may succeed
_TICKS = 20


class Watchdog(threading.Thread):
    """Calls `end` if heartbeat() is not called for `minutes`.

    It counts its own ticks instead of reading a clock, so that neither a clock that jumps nor a suspended process looks
    like a hang. A thread that holds Python's lock for ever is not detected.
    """

    def __init__(self, minutes: float, end: Callable[[], None]):
        super().__init__(name="watchdog", daemon=True)
        self._tick, self._end, self._ticks, self._closed = 60 * minutes / _TICKS, end, 0, threading.Event()

    def heartbeat(self) -> None:
        """Reports progress."""
        self._ticks = 0

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        while not self._closed.wait(self._tick):
            self._ticks += 1
            if self._ticks > _TICKS:
                self._end()
                return


@contextlib.contextmanager
def watched(minutes: float, workdir: Path, process: int = 0) -> Iterator[Callable[[], None]]:
    """Yields heartbeat(). After `minutes` without a call (0: no limit), the process exits with EXIT_CODE.

    Before that, the stacks of all threads are written to stderr and to WORKDIR/hang.txt (hang.N.txt for process N).
    """
    if not minutes:
        yield lambda: None
        return

    name = f"hang.{process}.txt" if process else "hang.txt"

    def end():
        title = f"no progress in {minutes:g} minutes (config.faults.hang_minutes): the stacks of all threads\n"
        with contextlib.suppress(OSError), open(workdir / name, "w") as file:
            _dump(file, title)
        _dump(sys.__stderr__, title)
        os._exit(EXIT_CODE)

    watchdog = Watchdog(minutes, end)
    watchdog.start()
    try:
        yield watchdog.heartbeat
    finally:
        watchdog.close()


def _dump(file, title: str) -> None:
    file.write(title)
    file.flush()
    faulthandler.dump_traceback(file)
    file.flush()
