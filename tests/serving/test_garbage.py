"""Thousands of requests that are wrong in all ways: each is refused clearly, and the server goes on as before."""

import collections
import json
import os
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from llada_jax.serving.listen import Limits
from tests.helpers.waiting import wait_until
from tests.serving import garbage
from tests.serving.running import alone, served, small_model

ASKED = {"model": "tiny", "prompt": "abc"}
CONNECTIONS = 8


@pytest.fixture(scope="module")
def server():
    with served(small_model(), rows=1, queue=2, limits=Limits(read_seconds=2.0, header_bytes=8192)) as running:
        yield running


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wrongs(server, requests) -> tuple[collections.Counter, list]:
    """How many of each kind were answered, and what was answered wrongly: (kind, data, status, body)."""
    found, wrong, client = collections.Counter(), [], garbage.Client(server.url)
    for request in requests:
        try:
            status, body = client.send(request)
        except Exception as error:
            wrong.append((request.kind, request.data[:300], type(error).__name__, b""))
            client.close()
            continue
        found[request.kind, status] += 1
        if status not in request.statuses or not (request.method == "HEAD" or is_clear(body)):
            wrong.append((request.kind, request.data[:300], status, body[:300]))
    client.close()
    return found, wrong


def is_clear(body: bytes) -> bool:
    """Whether it is an error in OpenAI's form, in one line, with nothing of the server's insides."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    inside = any(text in body for text in (b"Traceback", b"/llada", b".py", b"site-packages"))
    plain = isinstance(error["message"], str) and error["message"] and "\n" not in error["message"]
    return error.keys() == {"message", "type", "param", "code"} and plain and len(body) < 2000 and not inside


def flood(server, count: int, seed: int):
    results = [None] * CONNECTIONS

    def run(i: int) -> None:
        results[i] = wrongs(server, garbage.requests(seed + i, count // CONNECTIONS))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = sum((found for found, _ in results), collections.Counter())
    return counts, [each for _, wrong in results for each in wrong]


@pytest.mark.parametrize("count", [480, pytest.param(10_000, marks=pytest.mark.soak)])
def test_garbage_is_refused_and_the_server_goes_on(server, count):
    """Over several connections at once."""
    answer = alone(server.model, list(b"abc")).text
    assert server.http.post("/v1/completions", json=ASKED).json()["choices"][0]["text"] == answer
    submitted = server.engine.stats().submitted
    flood(server, count // 10, seed=1000)
    before, began = resident_bytes(), time.monotonic()
    counts, wrong = flood(server, count, seed=0)
    seconds, grown = time.monotonic() - began, resident_bytes() - before
    print(f"{sum(counts.values())} requests in {seconds:.1f} s, {grown / 1e6:.1f} MB more; {dict(counts)}")
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:5]}"
    assert sum(counts.values()) == count and server.engine.stats().submitted == submitted
    assert grown < 50e6
    assert server.http.post("/v1/completions", json=ASKED).json()["choices"][0]["text"] == answer
    assert server.http.get("/health").json() == {"status": "ok", "rows": 1, "busy": 0, "queue": 2, "queued": 0}


def test_bodies_that_never_end_hold_nobody_up(server):
    """Slow ones are cut off; those whose clients go away are forgotten."""
    host, port = server.url.removeprefix("http://").split(":")
    data = garbage.request("/v1/completions", b'{"mod', length=5000)
    slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(40)]
    for connection in slow:
        connection.sendall(data)
    for connection in slow[::2]:
        connection.close()
    assert httpx.post(f"{server.url}/v1/completions", json=ASKED, timeout=30).status_code == 200
    assert all(connection.recv(100) == b"" for connection in slow[1::2])
    wait_until(lambda: not server.server.server_state.tasks)
    for connection in slow:
        connection.close()
