"""What a server does under load, with clients that leave, are slow or send garbage, and with an engine that fails."""

import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from llada_jax.errors import InputError
from llada_jax.sampling.batches.requests import Answer
from llada_jax.serving import guard, page
from llada_jax.serving.engine import Engine
from llada_jax.serving.events import Event, Expired, QueueFull, Stopping
from llada_jax.serving.listen import Limits, bind
from tests.helpers.waiting import PATIENCE, wait_until
from tests.serving.running import LONGEST, Scripted, alone, served, small_model

ASKED = {"model": "tiny", "prompt": "abc"}
LONG = ASKED | {"max_tokens": 250}


class HeldEngine(Engine):
    """Stands still while it is held, from the next block on that it tells."""

    def __init__(self, *arguments, **options):
        self._free = threading.Event()
        self._free.set()
        super().__init__(*arguments, **options)

    @contextlib.contextmanager
    def held(self):
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def _tell(self, progress):
        super()._tell(progress)
        if progress.new:
            self._free.wait(PATIENCE)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def server(model):
    """One row, a short queue, short headers, two keys."""
    engine = HeldEngine(model, 1, LONGEST, queue=2, admit_every=4)
    with served(
        model, engine=engine, limits=Limits(header_bytes=4096), keys=("sesame", "second"), most_bytes=2000
    ) as running:
        alone(model, list(b"abc"))
        yield running


@pytest.fixture(scope="module")
def scripted(model):
    with served(model, engine=Scripted()) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(model):
    with served(model, engine=Scripted(), limits=Limits(read_seconds=0.5), deadline=1.0) as running:
        yield running


def post(server, fields, **more):
    return server.http.post("/v1/completions", json=fields, **more)


def idle(server):
    wait_until(lambda: (stats := server.engine.stats()).busy == stats.queued == 0)
    return server.engine.stats()


@contextlib.contextmanager
def streaming_later(server):
    """A stream, which may have to wait for its first text; it is left at the end."""
    with httpx.Client(base_url=server.url, headers=server.http.headers, timeout=PATIENCE) as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            yield response


@contextlib.contextmanager
def streaming(server):
    """A stream whose first text has come."""
    with streaming_later(server) as response:
        lines = response.iter_lines()
        next(line for line in lines if '"text":' in line)
        yield lines  # the connection is closed when nobody has them


@contextlib.contextmanager
def leaving(server):
    """Holds the engine, until it has heard that the clients who came and left inside are gone."""

    def gone():
        stats = server.engine.stats()
        return stats.submitted == stats.finished + stats.cancelled

    with server.engine.held():
        yield
        wait_until(gone)


def test_a_client_that_leaves_a_stream_frees_the_row(server):
    before = idle(server)
    with leaving(server), streaming(server):
        assert server.engine.stats().busy == 1
    after = idle(server)
    assert (after.cancelled, after.finished) == (before.cancelled + 1, before.finished)


def test_a_client_that_leaves_before_the_answer_frees_the_row(server):
    before, body = idle(server), json.dumps(LONG).encode()
    with leaving(server), connected(server) as connection:
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.engine.stats().busy == 1)
    after = idle(server)
    assert (after.cancelled, after.finished) == (before.cancelled + 1, before.finished)
    wait_until(lambda: b'{code="499",route="/v1/completions"}' in server.http.get("/metrics").content)


def test_what_waits_is_served_in_turn_and_what_is_too_much_is_told_to_come_back(server):
    idle(server)
    with leaving(server), streaming(server), streaming_later(server), streaming_later(server):
        wait_until(lambda: server.engine.stats().queued == 2)
        found = post(server, ASKED)
        assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
        assert found.json()["error"] | {"message": ""} == {
            "message": "", "type": "rate_limit_error", "param": None, "code": "queue_full",
        }  # fmt: skip
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(**ASKED)
        assert server.http.get("/health").json()["queued"] == 2
    idle(server)
    assert post(server, ASKED).status_code == 200


def test_several_answers_are_taken_all_or_none(server):
    before = idle(server)
    with streaming(server):
        assert post(server, ASKED | {"n": 2}).status_code == 200
    with leaving(server), streaming(server), streaming_later(server):
        wait_until(lambda: server.engine.stats().queued == 1)
        assert post(server, ASKED | {"n": 2}).status_code == 429
        assert server.engine.stats().queued == 1
    assert idle(server).finished == before.finished + 3
    assert post(server, ASKED | {"n": 3}).json()["error"]["param"] == "n"


def test_only_who_has_a_key_is_served(server):
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        for header in (None, "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer sesame2", "Bearer sésame"):
            found = httpx.get(server.url + path, headers={} if header is None else {"Authorization": header.encode()})
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
            assert found.json()["error"]["code"] == "invalid_api_key" and "sesame" not in found.text
    for key in ("sesame", "second"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    found = httpx.get(f"{server.url}/")
    assert (
        found.status_code == 200 and found.headers["content-type"].startswith("text/html") and found.text == page.read()
    )
    assert httpx.post(f"{server.url}/v1/completions", json=ASKED).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    "text, why", [("", "no keys"), ("# only\n\n", "no keys"), ("a b\n", "a key may hold"), ("é\n", "a key may hold")]
)
def test_a_file_of_keys_is_checked(tmp_path, text, why):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match=f"{file}: {why}"):
        guard.read_keys(str(file))
    file.write_text("# those of the lab\none\n\n two \n")
    assert guard.read_keys(str(file)) == ["one", "two"]
    with pytest.raises(InputError, match="No such file"):
        guard.read_keys(str(tmp_path / "none"))


def test_a_body_that_is_too_long_is_refused_told_or_not(server):
    long = ASKED | {"prompt": "x" * 3000}
    assert post(server, long).status_code == 413
    parts = (json.dumps(long)[i : i + 500].encode() for i in range(0, 3100, 500))
    chunked = server.http.post("/v1/completions", content=parts, headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
    form = server.http.post("/v1/completions", content=json.dumps(ASKED))
    assert form.status_code == 415
    assert server.http.get("/v1/completions").status_code == 405


def test_pages_of_other_sites_are_not_told_anything(server, model):
    found = server.http.get("/health", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in found.headers if name.startswith("access-control")]
    with served(model, engine=Scripted(), origins=("https://here.example",)) as open_to_one:
        for origin, allowed in (("https://here.example", True), ("https://elsewhere.example", False)):
            found = open_to_one.http.get("/health", headers={"Origin": origin})
            assert (found.headers.get("access-control-allow-origin") == origin) == allowed


def connected(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def raw(server, *parts, pause=0.0) -> bytes:
    """All that comes back for bytes that are sent."""
    with connected(server) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                found += part
        return found


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (b"",),
        (b"POST /v1/compl",),
        (HEAD,),
        (HEAD + b"Content-Length: 50\r\n\r\n", b'{"mod'),
        (HEAD + b"Content-Length: 5000\r\n\r\n", *([b"{"] * 1000)),
    ],
)
def test_a_client_that_sends_too_slowly_is_cut_off(impatient, parts):
    """Long before the minute that it has by default, or that the last of these would take to send all its parts."""
    began = time.monotonic()
    assert raw(impatient, *parts, pause=0.05) == b"" and time.monotonic() - began < 30


def test_small_pieces_are_sent_at_once(scripted):
    scripted.http.get("/health")
    sockets = [each.transport.get_extra_info("socket") for each in scripted.server.server_state.connections]
    assert sockets and all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)


def test_headers_are_limited(server):
    for end in (b"", b"\r\n\r\n"):
        found = raw(server, HEAD + b"X: " + b"y" * 10_000 + end)
        assert found.startswith(b"HTTP/1.1 400 ") and b'"type":"invalid_request_error"' in found
    assert raw(server, b"\x16\x03\x01 no http\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_client_that_does_not_read_is_cut_off(scripted, model):
    """More waits for it than the buffers hold."""
    body = json.dumps(ASKED | {"stream": True, "logprobs": 0}).encode()
    small = {"limits": Limits(write_seconds=0.3), "send_buffer": 4096, "deadline": 10 * PATIENCE}
    with served(model, engine=Scripted(), **small) as slow:
        tokens, zeros = np.full(5000, 97, np.int32), np.zeros(5000, np.int32)
        slow.engine.says = [Event("block", tokens, zeros, np.ones(5000, np.float32))] * 2
        host, port = slow.url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: slow.engine.cancelled == 1)


def test_other_paths_are_not_there(server):
    for path in ("/../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/page.html", "/%00", "/v1/models/"):
        assert server.http.get(path).status_code == 404


@pytest.mark.parametrize(
    "says, status, kind",
    [
        (QueueFull(3, 2.2), 429, "rate_limit_error"),
        (Stopping("x"), 503, "server_error"),
        (Expired("x"), 504, "server_error"),
        (InputError("prompt is bad"), 400, "invalid_request_error"),
        (RuntimeError("secret of /some/file.py"), 500, "server_error"),
    ],
)
def test_errors_of_the_engine_are_told_without_their_details(scripted, says, status, kind):
    scripted.engine.says = says
    found = post(scripted, ASKED)
    error = found.json()["error"]
    assert (found.status_code, error["type"]) == (status, kind) and "secret" not in found.text
    assert found.headers.get("retry-after") == ("3" if status == 429 else None)
    streamed = post(scripted, ASKED | {"stream": True})
    if isinstance(says, QueueFull | Stopping):
        assert streamed.status_code == status
    else:
        assert streamed.status_code == 200 and json.loads(streamed.text.split("\n\n")[-3][6:])["error"] == error
        with pytest.raises(openai.APIError):
            list(scripted.client.completions.create(**ASKED, stream=True))


def test_a_deadline_ends_a_request_even_if_the_engine_says_nothing(impatient):
    impatient.engine.cancelled, impatient.engine.requests = 0, []
    began = time.monotonic()
    assert post(impatient, ASKED).status_code == 504 and impatient.engine.cancelled == 1
    ((_, deadline),) = impatient.engine.requests
    assert began + 1 <= deadline < time.monotonic() < began + 60


def test_a_block_that_stays_behind_the_reader_is_told_once(scripted):
    """Of blocks as they stand, the last one is enough for a client that has not read those before."""
    tokens = np.array([97, 98], np.int32)
    standing = [Event("provisional", tokens, np.array([0, -1], np.int32), np.ones(2, np.float32))] * 50
    block = Event("block", tokens, np.array([0, 1], np.int32), np.array([0.0, 1.0], np.float32))
    empty = np.zeros(0, np.int32)
    done = Answer(0, tokens, None, 1, 2, 0, 9, tokens, tokens, empty, empty, empty)
    scripted.engine.says = [*standing, block, *standing, Event("done", answer=done)]
    lines = post(scripted, ASKED | {"stream": True, "provisional": True, "logprobs": 0}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [[*chunk.keys()][-1] for chunk in chunks] == ["provisional", "committed", "provisional", "choices"]
    assert chunks[0]["provisional"] == {"index": 0, "pieces": ["a", None], "steps": [0, -1]}
    assert chunks[1]["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0, 0.0]


def test_a_port_that_is_taken_is_told(server):
    port = server.url.rpartition(":")[2]
    with pytest.raises(InputError, match=f"--port={port}: "):
        bind("127.0.0.1", int(port)).listen()
    with pytest.raises(InputError, match="--host=256.1.1.1"):
        bind("256.1.1.1", 0)
