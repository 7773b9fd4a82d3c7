"""The engine of a server: requests of any thread, decoded together by one thread that owns the device.

    submit -> queue (bounded) -> a row of the batch -> events, on the engine's thread: block, ..., block, done

Between two steps of the batch the thread drops what was cancelled or is too late, and admits what fits, first come,
first served. A request whose config cannot share the batch waits until that has drained, and those behind it wait too.
What fails fails alone: a request by its own error, those in the batch by an error of the device, after which the engine
goes on with a fresh batch.
"""

import collections
import contextlib
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from llada_jax.checkpoint.weights import Model
from llada_jax.errors import InputError
from llada_jax.model.forward import Execution
from llada_jax.sampling.batches.prefixes import Prefixes, chunk_bytes
from llada_jax.sampling.batches.requests import Request, Usage
from llada_jax.sampling.batching import Batch, Progress
from llada_jax.sampling.generate import prefill_execution
from llada_jax.sampling.state import PREFILL_CHUNK, Written
from llada_jax.serving.events import Event, Expired, QueueFull, Stats, Stopping

_RECENT = 32  # requests that tell how long one takes


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that the engine has taken."""

    _engine: "Engine"
    _number: int
    _request: Request
    _on_event: Callable[[Event], None]
    _provisional: bool
    _deadline: float | None
    _admitted: float = 0.0  # time.monotonic() of it
    _ended: bool = False
    _seen: Written | None = None  # the last "provisional"

    def cancel(self) -> None:
        """Ends the request: it gets no more events, but for one that the engine's thread is just telling. Its row is
        free after the step under way. Does nothing to a request that has ended.
        """
        self._engine._cancel(self)

    def _has_seen(self, standing: Written) -> bool:
        seen, self._seen = self._seen, standing
        return seen is not None and all(map(np.array_equal, seen, standing))


class Engine:
    """Decodes requests of any thread.

    model: its tokenizer is not used, requests and events hold tokens. rows: requests decoded together. max_length: most
    tokens of a prompt and its answer together. queue: most requests that wait for a row. admit_every: passes between
    two looks at who has come, left or finished; one while a running request wants provisional events. prefix_bytes: of
    each device, for keys and values of the beginnings of prompts of more than prefill_chunk tokens, in whole chunks of
    so many; 0: none. prefill_chunk, execution, fuse_share: as in sampling.batching.serve; execution None is the fastest
    on this device. mesh: that the model is laid out over. Raises InputError on a number that is too low.

    Also a context manager: leaving it stops the engine, after an exception at once.

    Example:
        >>> import llada_jax, queue
        >>> from llada_jax.serving.engine import Engine
        >>> model = llada_jax.load_checkpoint("checkpoint")
        >>> settings = llada_jax.GenerateConfig(gen_length=8, block_length=8, steps=2)
        >>> events = queue.Queue()
        >>> with Engine(model, rows=2, max_length=16) as engine:
        ...     ticket = engine.submit(llada_jax.Request(model.tokenizer.encode("def f("), settings), events.put)
        >>> [event.kind for event in events.queue][-1]
        'done'
    """

    def __init__(
        self, model: Model, rows: int, max_length: int, queue: int = 64, admit_every: int = 1, prefix_bytes: int = 0,
        prefill_chunk: int = PREFILL_CHUNK, execution: Execution | None = None, fuse_share: float | None = None,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        if queue < 1:
            raise InputError(f"queue={queue}, expected at least 1")
        self._mesh, self._usage, self._prefixes = mesh, Usage(), None
        with self._mesh_in_force():
            execution = prefill_execution(max_length) if execution is None else execution
            if prefix_bytes:
                self._prefixes = Prefixes(prefix_bytes)
                _check_room(prefix_bytes, model, execution, min(prefill_chunk, max_length))
            self._batch = Batch(
                model.params, model.config, rows, max_length, admit_every=admit_every, execution=execution,
                fuse_share=fuse_share, usage=self._usage, prefill_chunk=prefill_chunk,
                prefixes=self._prefixes,
            )  # fmt: skip
        self._rows, self._limit = rows, queue
        self._changed = threading.Condition()  # guards what follows
        self._queue: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Ticket] = {}  # by number; only the engine's thread changes it
        self._counts = collections.Counter()
        self._took: collections.deque[float] = collections.deque(maxlen=_RECENT)  # seconds in a row of the batch
        self._stopping, self._end_at = False, float("inf")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, on_event: Callable[[Event], None], provisional: bool = False,
        deadline: float | None = None,
    ) -> Ticket:  # fmt: skip
        """Queues a request. on_event: called on the engine's thread, so it should return at once; if it raises, the
        request ends. provisional: tell of blocks as they stand after each pass. deadline: in time.monotonic() seconds.
        The seed None is the request's number since the engine started.

        Raises InputError on a request that could not run even alone, QueueFull, Stopping.
        """
        try:
            with self._mesh_in_force():
                prompt = self._batch.check(request)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from None
        request = dataclasses.replace(request, prompt=prompt)
        with self._changed:
            if self._stopping:
                raise Stopping("the engine is stopping")
            if len(self._queue) >= self._limit:
                self._counts["rejected"] += 1
                raise QueueFull(len(self._queue), self._until_a_place())
            ticket = Ticket(self, self._counts["submitted"], request, on_event, provisional, deadline)
            self._counts["submitted"] += 1
            self._queue.append(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> Stats:
        """Counts at this moment."""
        with self._changed:
            known = self._prefixes
            counts = (0, 0, 0) if known is None else (known.hits, known.misses, known.bytes)
            prefixes = dict(zip(("prefix_hits", "prefix_misses", "prefix_bytes"), counts, strict=True))
            names = ("submitted", "rejected", "finished", "cancelled", "expired", "failed", "resets", "tokens")
            usage = self._usage
            return Stats(
                rows=self._rows, busy=len(self._running), queue=self._limit, queued=len(self._queue),
                **{name: self._counts[name] for name in (*names, "prompt_tokens")}, passes=usage.iterations,
                row_passes=usage.row_passes, running_row_passes=usage.running_row_passes,
                prefill_passes=usage.prefill_passes, **prefixes,
                alive=self._thread.is_alive(), stopping=self._stopping,
            )  # fmt: skip

    def stop(self, grace: float | None = None) -> None:
        """Takes no more requests, finishes those that run or wait, and ends the thread. grace: seconds, after which
        those that are left end with the error Stopping; None: as long as it takes. Returns when the thread has ended;
        on that thread itself, at once.
        """
        with self._changed:
            self._stopping = True
            if grace is not None:
                self._end_at = min(self._end_at, time.monotonic() + grace)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop(None if kind is None else 0)

    # ---- on the engine's thread

    def _loop(self) -> None:
        with self._mesh_in_force():
            while self._wait():
                try:
                    self._drop()
                    self._admit()
                    self._tell(self._step())
                except Exception as error:
                    self._reset(error)
            self._batch.clear()
            if self._prefixes is not None:
                self._prefixes.clear()

    def _wait(self) -> bool:
        """Sleeps while there is nothing to do. Returns whether there is, and not all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._running or self._stopping)
            return bool(self._queue or self._running)

    def _drop(self) -> None:
        """Ends requests that were cancelled or are too late."""
        now, dropped = time.monotonic(), []
        with self._changed:
            for ticket in [*self._queue, *self._running.values()]:
                late = ticket._deadline is not None and now >= ticket._deadline
                if not (ticket._ended or late or now >= self._end_at):
                    continue
                dropped.append((ticket, Expired("the deadline has passed") if late else Stopping("the engine stops")))
                if self._running.pop(ticket._number, None) is None:
                    self._queue.remove(ticket)
        for ticket, error in dropped:
            self._batch.cancel(ticket._number)
            self._end(ticket, "expired" if isinstance(error, Expired) else "failed", Event("error", error=error))

    def _admit(self) -> None:
        while self._batch.free:
            with self._changed:
                if not self._queue:
                    return
                if not self._batch.fits(self._queue[0]._request.config):
                    if self._running:
                        return
                    self._batch.clear()
                ticket = self._queue.popleft()
                self._running[ticket._number] = ticket
            ticket._admitted = time.monotonic()
            self._counts["prompt_tokens"] += len(ticket._request.prompt)
            try:
                self._batch.admit(ticket._number, ticket._request)
            except InputError as error:
                self._leave(ticket)
                self._end(ticket, "failed", Event("error", error=error))

    def _step(self) -> Progress:
        asked = {number for number, ticket in self._running.items() if ticket._provisional}
        return self._batch.step(1 if asked else None, standing=asked)

    def _tell(self, progress: Progress) -> None:
        answers = {answer.index: answer for answer in progress.answers}
        for number, ticket in list(self._running.items()):
            if new := progress.new.get(number):
                self._counts["tokens"] += len(new.tokens)
                self._send(ticket, Event("block", *new, passes=progress.passes[number]))
            if answer := answers.get(number):
                self._leave(ticket)
                self._took.append(time.monotonic() - ticket._admitted)
                self._end(ticket, "finished", Event("done", answer=answer))
            elif standing := progress.standing.get(number):
                if not ticket._has_seen(standing):
                    self._send(ticket, Event("provisional", *standing))

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            del self._running[ticket._number]

    def _send(self, ticket: Ticket, event: Event) -> None:
        if not ticket._ended and not _told(ticket, event):
            self._cancel(ticket, "failed")

    def _end(self, ticket: Ticket, count: str, event: Event) -> None:
        """Sends the last event."""
        if self._cancel(ticket, count):
            _told(ticket, event)

    def _reset(self, error: Exception) -> None:
        """Ends all that run, after an error that is not one of a request alone."""
        traceback.print_exception(error)
        error = error.with_traceback(None)  # whose frames hold arrays of the device
        with self._changed:
            running = list(self._running.values())
            self._running.clear()
            self._counts["resets"] += 1
        self._batch.clear()
        if self._prefixes is not None:
            self._prefixes.clear()
        for ticket in running:
            self._end(ticket, "failed", Event("error", error=error))

    # ---- on any thread

    def _cancel(self, ticket: Ticket, count: str = "cancelled") -> bool:
        """Counts the end of a request, whose row the engine's thread will free; False if it has ended before."""
        with self._changed:
            if ticket._ended:
                return False
            ticket._ended = True
            self._counts[count] += 1
            if ticket in self._queue:
                self._queue.remove(ticket)
            return True

    def _until_a_place(self) -> float:
        """Seconds until a waiting request gets a row, by how long the last requests took and how many run at once."""
        if self._took:
            return sum(self._took) / len(self._took) / self._rows
        since = [ticket._admitted for ticket in self._running.values() if ticket._admitted]
        return max(time.monotonic() - min(since), 1.0) if since else 1.0

    def _mesh_in_force(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _told(ticket: Ticket, event: Event) -> bool:
    """Whether the request could be told of the event."""
    try:
        ticket._on_event(event)
        return True
    except BaseException:  # of the server's, whatever it is; asyncio.CancelledError is no Exception
        traceback.print_exc()
        return False


def _check_room(prefix_bytes: int, model: Model, execution: Execution, size: int) -> None:
    dtype = execution.dtype or str(model.params["embedding"].dtype)
    if prefix_bytes < (least := chunk_bytes(model.config, execution, size, dtype)):
        raise InputError(f"prefix_bytes={prefix_bytes}, expected at least {least}: a chunk of {size} tokens")
