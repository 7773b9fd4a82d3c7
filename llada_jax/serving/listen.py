"""Serves an app over HTTP/1.1 until a signal: what runs is finished then. Slow clients are cut off."""

import contextlib
import dataclasses
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llada_jax.errors import InputError
from llada_jax.serving.refusals import Refused
from llada_jax.serving.wire import as_json


@dataclasses.dataclass(frozen=True)
class Limits:
    """read_seconds: for a client to send a request, from its first byte, or from the connection's beginning.
    write_seconds: in which a client must read some of what waits for it. header_bytes: of a request's line and headers.
    connections: at once. grace: seconds for what runs to finish after a signal; None: as long as it takes.
    """

    read_seconds: float = 60.0
    write_seconds: float = 60.0
    header_bytes: int = 32 << 10
    connections: int = 1024
    grace: float | None = None


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; port 0 is any free one. Raises InputError naming host and port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)  # asyncio sends without delay where the protocol is said
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InputError(f"--host={host} --port={port}: {error.strerror or error}") from error
    return bound


def run(app, bound: socket.socket, limits: Limits, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT; a second SIGINT ends it at once. ready: called when it listens."""
    Server(app, limits, ready).run(sockets=[bound])


class Server(uvicorn.Server):
    """A uvicorn server that tells when it listens, and whose process does not die of the signal that ended it. In
    another thread than the main one, `should_exit = True` is the signal.
    """

    def __init__(self, app, limits: Limits = Limits(), ready: Callable[[], None] = lambda: None):
        self._ready = ready
        super().__init__(
            uvicorn.Config(
                app, http=_protocol(limits), ws="none", lifespan="off", loop="asyncio", log_config=None,
                access_log=False, server_header=False, proxy_headers=False, limit_concurrency=limits.connections,
                timeout_graceful_shutdown=limits.grace, h11_max_incomplete_event_size=limits.header_bytes,
                backlog=limits.connections,
            )
        )  # fmt: skip

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol with the two timeouts, which it does not have, and OpenAI's form for what is no HTTP."""

    class Protocol(H11Protocol):
        _reading = _writing = None  # timers

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._reading = self.loop.call_later(limits.read_seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            for at in range(0, len(data), limits.header_bytes):  # h11 takes whole headers of any length at once
                if not self.transport.is_closing():
                    super().data_received(data[at : at + limits.header_bytes])
            state = self.conn.their_state
            unfinished = state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0])
            if not unfinished:
                self._reading = _cancelled(self._reading)
            elif self._reading is None:
                self._reading = self.loop.call_later(limits.read_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._writing = _cancelled(self._writing)

        def send_400_response(self, msg: str) -> None:
            body = as_json(Refused(400, "this is no HTTP/1.1 request, or its headers are too long").body)
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            begin = h11.Response(status_code=400, headers=list(headers.items()))
            for event in (begin, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def connection_lost(self, error: Exception | None) -> None:
            self._reading, self._writing = _cancelled(self._reading), _cancelled(self._writing)
            super().connection_lost(error)

    return Protocol


def _cancelled(timer) -> None:
    if timer is not None:
        timer.cancel()
