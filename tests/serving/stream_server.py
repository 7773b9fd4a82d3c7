"""A server that serves the page and answers with what a test has written down, as fast as the test lets it."""

import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llada_jax.serving import page

PAUSE, HANG_UP, DONE = object(), object(), object()
USAGE = {"completion_tokens": 6, "forward_passes": 4, "commit_passes": 1, "prefill_passes": 1, "seconds": 0.5}
USAGE |= {"tokens_per_forward": 1.0}


def provisional(*pieces: tuple[str | None, int]) -> dict:
    """A chunk that shows the block being written: (text, or None where masked; step) of each token."""
    return _chunk("") | {"provisional": _tokens(pieces)}


def committed(*pieces: tuple[str, int], text: str | None = None) -> dict:
    """A chunk of finished tokens. text: where it is not that of the pieces."""
    text = "".join(piece for piece, _ in pieces) if text is None else text
    return _chunk(text) | {"committed": _tokens(pieces)}


def end(reason: str = "stop", **usage) -> list:
    return [_chunk("", reason), {"choices": [], "usage": USAGE | usage}, DONE]


def _tokens(pieces) -> dict:
    return {"index": 0, "pieces": [piece for piece, _ in pieces], "steps": [step for _, step in pieces]}


def _chunk(text: str, reason: str | None = None) -> dict:
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


class StreamServer:
    """answers: one for each request to come. A list is streamed: chunks; PAUSE, until the test calls `go_on`; HANG_UP;
    DONE. (status, error, headers) is refused. asked: bodies of the requests so far; keys: their Authorization.
    left: set when the client went away during a pause.
    """

    def __init__(self):
        self.forget()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def go_on(self) -> None:
        self._steps.release()

    def pause_of(self, connection: socket.socket) -> Callable[[], bool]:
        """A function that waits for the test; False if the client went away."""
        steps, left = self._steps, self.left  # of this test: the next one begins before its page is gone

        def may_go_on() -> bool:
            while not steps.acquire(timeout=0.02):
                if select.select([connection], [], [], 0)[0] and not connection.recv(1, socket.MSG_PEEK):
                    left.set()
                    return False
            return True

        return may_go_on

    def forget(self, *answers) -> None:
        """Begins anew, with these answers to come."""
        self.answers, self.asked, self.keys = list(answers), [], []
        self.left, self._steps = threading.Event(), threading.Semaphore(0)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(server: StreamServer):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path == "/":
                self._whole(200, page.read().encode(), "text/html; charset=utf-8")
            else:
                self._whole(200, json.dumps({"data": [{"id": "mock-model"}]}).encode())

        def do_POST(self):
            server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            server.keys.append(self.headers["Authorization"])
            answer = server.answers.pop(0)
            if isinstance(answer, tuple):
                status, message, headers = answer
                return self._whole(status, json.dumps({"error": {"message": message}}).encode(), **headers)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for data in self._data(answer):
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()

        def _data(self, answer) -> Iterator[str]:
            may_go_on = server.pause_of(self.connection)
            for item in answer:
                if item is HANG_UP or (item is PAUSE and not may_go_on()):
                    return
                if item is not PAUSE:
                    yield "[DONE]" if item is DONE else json.dumps(item)

        def _whole(self, status: int, body: bytes, kind: str = "application/json", **headers):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

    return Handler
