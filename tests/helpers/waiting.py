"""Waits for what other processes do, and looks at them."""

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 120.0  # seconds: what takes longer is not slow, it is broken


def wait_until(happened: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_files(folder: Path) -> list[str]:
    """Paths in the folder that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # of another thread, and closed
            continue
    return [path for path in found if path.startswith(f"{folder}/")]
