"""TensorBoard event files, written in the caller's thread.

tensorboardX's own SummaryWriter writes in a thread that a full disk ends, and then blocks for ever.
"""

import os
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class Events:
    """One event file in `folder`. Points from `purge_step` on that earlier files hold are not shown."""

    def __init__(self, folder: Path, purge_step: int):
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{purge_step}")
        self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._writer.write_event(Event(step=step, summary=summary.scalar(name, value)))

    def flush(self) -> None:
        """Raises OSError."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
