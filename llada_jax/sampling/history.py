"""All that decoding wrote, edits included, in order: what a learner of trajectories replays."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from llada_jax.errors import InputError
from llada_jax.sampling.state import WriteLog

WRITES = 8  # that a row's log has room for, per position of the canvas, where written tokens are edited


class History(NamedTuple):
    """The writes to one answer, in the order of passes, then of positions: arrays [writes].

    position int32: in the replay of the answer, from 0. token int32. step int32: of its block, from 0. forward int32:
    which of the row's denoising passes it was, from 0. confidence float32: the token's probability in it. A position
    that is edited occurs again; its last token is that of the replay.
    """

    position: np.ndarray
    token: np.ndarray
    step: np.ndarray
    forward: np.ndarray
    confidence: np.ndarray


def room(history: bool | int, rule: str) -> int:
    """The room of a row's log, per position: an int as it is; for True, WRITES where the rule edits, else 1. Raises
    InputError on another value.
    """
    if history and rule == "llada2.2":
        raise InputError('history: not with rule="llada2.2", whose edits move what was written')
    if isinstance(history, bool | np.bool_):
        return (WRITES if rule == "llada2.1" else 1) if history else 0
    if not isinstance(history, int | np.integer) or not 0 <= history < 2**16:
        raise InputError(f"history={history!r}, expected true, false, or writes per position")
    return int(history)


def collect(log: WriteLog, rows: np.ndarray, starts: Sequence[int], ends: Sequence[int]) -> list[History]:
    """The histories of `rows` [n], of positions starts[i] to ends[i] - 1 of the canvas, counted from starts[i]. Raises
    InputError if a log was too small.
    """
    counts, capacity = jax.device_get(log.count)[rows], log.token.shape[1]
    if counts.max() > capacity:
        raise InputError(
            f"history: {counts.max()} writes to one row, its log has room for {capacity}; set history to more writes "
            "per position"
        )
    most = int(counts.max())
    whole = jax.device_get([getattr(log, name)[:, :most] for name in History._fields])
    found = []
    for row, count, start, end in zip(rows, counts, starts, ends, strict=True):
        history = History(*(array[row, :count] for array in whole))
        history = history._replace(position=history.position - start)
        found.append(History(*(array[history.position < end - start] for array in history)))
    return found
