"""Clients of a server, as threads of a process of their own: the standard library only, so that they take little."""

import concurrent.futures
import http.client
import json
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple


class Asked(NamedTuple):
    """What a request took. first_block: seconds until text came. tokens: of its answer."""

    first_block: float
    tokens: int


def ask_all(port: int, bodies: Sequence[dict], clients: int) -> tuple[list[Asked], float]:
    """Streams completions of all bodies from this machine's port, each client the next one that is left. Returns what
    each took, and the seconds of all.
    """
    own, begin = threading.local(), time.perf_counter()

    def ask(body: dict) -> Asked:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port)
        return _ask(own.connection, body)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, bodies)), time.perf_counter() - begin


def _ask(connection: http.client.HTTPConnection, body: dict) -> Asked:
    begin, first = time.perf_counter(), None
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter() - begin
        last = line
    return Asked(first, json.loads(last[6:])["usage"]["completion_tokens"])
