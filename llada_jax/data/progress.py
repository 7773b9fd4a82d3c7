"""Progress of a pass over source files: one updated line on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from llada_jax.data import sources

_TERMINAL_SECONDS = 1.0
_PLAIN_SECONDS = 10.0


@contextlib.contextmanager
def progress_lines(
    files: Sequence[sources.SourceFile], position: tuple[int, int], tokens: int, log: TextIO | None
) -> Iterator[Callable[[tuple[int, int], int, int], None]]:
    """Yields report(position, documents, tokens), which may be called as often as convenient.

    position: the (file index, offset) reached; the counts are totals. The arguments of this function are the values at
    the start, so that speed and remaining time describe this run alone. If `log` is None, nothing is written.
    """
    if log is None:
        yield lambda position, documents, tokens: None
        return
    total_bytes = max(1, sum(file.bytes for file in files))
    first_bytes, first_tokens = sources.bytes_before(files, position), tokens
    begun = time.monotonic()
    due = begun + _TERMINAL_SECONDS
    terminal = log.isatty()
    written = False

    def report(position: tuple[int, int], documents: int, tokens: int) -> None:
        nonlocal due, written
        now = time.monotonic()
        if now < due:
            return
        due = now + (_TERMINAL_SECONDS if terminal else _PLAIN_SECONDS)
        done = sources.bytes_before(files, position)
        rate = (tokens - first_tokens) / (now - begun)
        left = (now - begun) * (total_bytes - done) / (done - first_bytes) if done > first_bytes else float("inf")
        line = f"{documents} documents, {tokens} tokens, {rate:.0f} tokens/s, {done / total_bytes:.1%} of the input"
        line += f", {left:.0f} s left" if left < float("inf") else ""
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=log, flush=True)
        written = True

    try:
        yield report
    finally:
        if terminal and written:
            print(file=log)
