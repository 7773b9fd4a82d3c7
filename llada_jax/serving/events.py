"""What the engine tells: events of a request, its errors, and counts."""

import dataclasses

import numpy as np

from llada_jax.sampling.batches.requests import Answer


class QueueFull(Exception):
    """Too many requests wait. retry_after: seconds until one of them has probably been admitted."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already, try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class Stopping(Exception):
    """The engine takes no more requests, or ended before this one had finished."""


class Expired(Exception):
    """The request's deadline came before its answer."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What a request is told, in this order: "block" and "provisional", any number, then "done" or "error", once.

    tokens: int32, of "block" those of the answer that are new, up to and including an end of sequence; of "provisional"
    those of the blocks that are being written, as they stand. steps: for each the step of its block that wrote it,
    int32; confidence: its probability then, float32. Where nothing is written yet stand the mask, step -1 and
    probability 0. answer: of "done"; its tokens are those of all "block" events, its text is None. error: of "error":
    an InputError is the request's fault; Expired; Stopping; any other is the device's. passes: of "block", (prefill,
    forward, commit) passes so far, as in Answer.
    """

    kind: str
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    steps: np.ndarray | None = None
    confidence: np.ndarray | None = None
    answer: Answer | None = None
    error: Exception | None = None
    passes: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """rows: of the batch, of which `busy` have requests; queued: requests that wait, of at most `queue`.

    Since the engine started: requests submitted (accepted by `submit`) and rejected (the queue was full); of those
    submitted, finished, cancelled, expired, and failed: by errors of their callbacks, of the device or of an end with
    too little grace. resets: errors of the device. tokens: of answers, as told by events; prompt_tokens: of requests
    that have got a row. passes, row_passes, running_row_passes, prefill_passes: as in Usage. prefix_hits,
    prefix_misses: chunks of prompts that were known, and that were computed; prefix_bytes: of those that are known now,
    on each device. alive: whether the thread runs; stopping: whether it is about to end.
    """

    rows: int
    busy: int
    queue: int
    queued: int
    submitted: int
    rejected: int
    finished: int
    cancelled: int
    expired: int
    failed: int
    resets: int
    tokens: int
    prompt_tokens: int
    passes: int
    row_passes: int
    running_row_passes: int
    prefill_passes: int
    prefix_hits: int
    prefix_misses: int
    prefix_bytes: int
    alive: bool
    stopping: bool
