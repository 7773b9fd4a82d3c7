"""Progress of copying bytes: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_PLAIN_SECONDS = 10.0


@contextlib.contextmanager
def byte_progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields advance(bytes). total None: size and time left are unknown. Writes to stderr."""
    if sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
        return
    begun = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS:
            last = now
            print(f"{title}: {_text(done, total, now - begun)}", file=sys.stderr, flush=True)

    yield advance
    print(f"{title}: {_text(done, None, time.monotonic() - begun)}, done", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def _text(done: int, total: int | None, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    text = f"{done / 2**30:.2f} GiB"
    if total:
        text += f" of {total / 2**30:.2f} ({done / total:.0%})"
    text += f", {rate / 1e6:.0f} MB/s"
    return text + (f", {max(0, total - done) / max(rate, 1.0):.0f} s left" if total else "")
