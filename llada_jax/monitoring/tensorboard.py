"""TensorBoard event files, written in the caller's thread.

tensorboardX's SummaryWriter writes in its own thread. A full disk ends that thread, and adding a point then hangs.
"""

import os
import socket
import struct
import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


class Events:
    """One event file in `folder`. TensorBoard hides points of earlier files from `purge_step` on."""

    def __init__(self, folder: Path, purge_step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{purge_step}"
        self._file, self._left = open(folder / name, "wb", buffering=0), b""
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step=step, summary=summary.scalar(name, value))

    def flush(self) -> None:
        """Writes pending points; after an OSError it can be called again and continues."""
        while self._left:
            self._left = self._left[self._file.write(self._left) :]

    def close(self) -> None:
        with self._file:
            self.flush()

    def _add(self, **fields) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        self._left += length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
