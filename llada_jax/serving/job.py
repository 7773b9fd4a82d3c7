"""The requests of one client's call, from the engine's thread to the event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from llada_jax.sampling.batches.requests import Request
from llada_jax.serving.choices import Choice, Delta
from llada_jax.serving.engine import Engine, Ticket
from llada_jax.serving.events import Event, Expired

_LATE = 2.0  # seconds after the deadline in which the engine, which may be compiling, can say so itself


class Job:
    """Submits the requests, all or none. on_first: called when the first block has come. deadline: in time.monotonic()
    seconds. Raises what Engine.submit does. Of the running event loop.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], choices: Sequence[Choice], provisional: bool,
        deadline: float, on_first: Callable[[], None],
    ):  # fmt: skip
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._waiting: list[tuple[int, Event]] = []
        self._choices, self._deadline, self._on_first = choices, deadline, on_first
        self._told = False
        self._tickets: list[Ticket] = []
        try:
            for i, request in enumerate(requests):
                ticket = engine.submit(request, self._from_engine(i), provisional, deadline)
                self._tickets.append(ticket)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Frees the rows of all that run."""
        for ticket in self._tickets:
            ticket.cancel()

    async def deltas(self, pause: float = float("inf")) -> AsyncIterator[list[Delta]]:
        """What comes, together what has come meanwhile, until all choices are at their ends. pause: seconds after which
        an empty list says that nothing has come. Raises the error that ends a request.
        """
        while any(choice.finish_reason is None for choice in self._choices):
            if not await self._wait(pause):
                yield []
                continue
            found, self._waiting = self._waiting, []
            self._arrived.clear()
            yield [delta for index, event in found if (delta := self._take(index, event)) is not None]

    async def _wait(self, pause: float) -> bool:
        left = self._deadline + _LATE - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(pause, max(left, 0))):
                await self._arrived.wait()
        if not self._arrived.is_set() and time.monotonic() >= self._deadline + _LATE:
            raise Expired("the deadline has passed")
        return self._arrived.is_set()

    def _take(self, index: int, event: Event) -> Delta | None:
        if event.kind == "error":
            raise event.error
        choice = self._choices[index]
        if event.kind == "block" and not self._told:
            self._told = True
            self._on_first()
        delta = choice.take(event)
        if choice.finish_reason is not None and event.kind == "block":  # a stop text: the rest is not wanted
            self._tickets[index].cancel()
        return delta

    def _from_engine(self, index: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
                self._loop.call_soon_threadsafe(self._put, index, event)

        return on_event

    def _put(self, index: int, event: Event) -> None:
        if event.kind == "provisional" and self._waiting and self._waiting[-1][0] == index:
            if self._waiting[-1][1].kind == "provisional":  # which is old now
                self._waiting.pop()
        self._waiting.append((index, event))
        self._arrived.set()
