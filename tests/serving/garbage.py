"""Requests that no server should honour, as bytes of HTTP/1.1, and a client that sends them as they are."""

import http.client
import json
import random
import socket
import string
from collections.abc import Iterator
from typing import NamedTuple

PATHS = {"/v1/completions": {"prompt": "abc"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}}
_LARGE = 10**400  # as JSON writes it; Python's own limit is 4300 digits
_NO_NUMBERS = ["1", [], {}, [1], True, {"a": 1}, "\ud800"]
_NO_COUNTS = [*_NO_NUMBERS, -1, 1.5, _LARGE, 2**63]
# Values that no field of that name may have.
_WRONG = {
    "model": [1, [], {}, True, "other", "", "../../etc/passwd", "\ud800", ["tiny"], "x" * 10_000],
    "prompt": [1, {}, True, [], [[]], [1.5], ["a", 1], [None], [[["a"]]], [-1], [_LARGE], "", "\ud800", [10**6]],
    "messages": [1, {}, "a", [], [1], [[]], [{}], [{"role": 1}], [{"role": "wizard", "content": "a"}],
                 [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "user", "content": "a", "zzz": 1}], [{"role": "assistant", "content": "a"}],
                 [{"role": "user", "content": "a", "tool_calls": [{"id": 1}]}]],
    "eos_early_stop": [1, "true", []],
    "temperature": [*_NO_NUMBERS, -0.1, 2.1, _LARGE], "top_p": [*_NO_NUMBERS, -1, 1.5, _LARGE],
    **dict.fromkeys(("max_tokens", "seed"), _NO_COUNTS), "n": [*_NO_COUNTS, 0, 129],
    "top_k": [*_NO_NUMBERS, -5, 1.5], "steps": [*_NO_COUNTS, 0], "block_length": [*_NO_COUNTS, 0, 2**30],
    "stop": [1, {}, True, [1], "", [""], ["x"] * 65, "x" * 1001, [None]], "stream": [1, "true", [], {}],
    "stream_options": [1, [], True, {"include_usage": 1}, {"zzz": 1}],
    "rule": [1, [], "no such", {}, "\ud800", "x" * 5000],
    "logit_bias": [{"5": 1}, [], 1, "a"], "presence_penalty": [1, "0", False, []], "threshold": [*_NO_NUMBERS, -1],
}  # fmt: skip
_WRONG_OF_CHATS = {
    "tools": [1, "a", {}, [1], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": 5}}]],
    "tool_choice": ["required", 1, {}, {"type": "function", "function": {"name": "f"}}], "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_object"}, 1], "chat_template_kwargs": [1, [], {"messages": []}],
    "logprobs": [1, "true", {}], "top_logprobs": [21, -1, "1", True],
}  # fmt: skip
_OTHERS = "GET PUT DELETE PATCH HEAD OPTIONS TRACE BREW".split()
_TYPES = ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "jsn", "\xff")


class Request(NamedTuple):
    """data: its bytes. statuses: those of an answer; none where the server may close without one."""

    kind: str
    method: str
    data: bytes
    statuses: tuple[int, ...] = (400,)


def request(path: str, body: bytes, method: str = "POST", kind="application/json", length=None, more="") -> bytes:
    """A whole request. length: what it says of its body, where that is not so."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n"
    return (head + f"Content-Type: {kind}\r\n{more}\r\n").encode("latin-1") + body


def requests(seed: int, count: int) -> Iterator[Request]:
    """Such requests of all kinds in turn."""
    draw = random.Random(seed)
    makers = (_changed_bytes, _wrong_value, _unknown_field, _no_utf8, _nested, _large_number, _cut, _other_method,
              _other_path, _other_type, _bad_head, _bad_length)  # fmt: skip
    for i in range(count):
        maker = makers[i % len(makers)]
        yield Request(maker.__name__.strip("_"), *maker(draw))


def _good(draw) -> tuple[str, dict]:
    path = draw.choice(list(PATHS))
    return path, {"model": "tiny", "temperature": 0.5, "stop": ["x"], "n": 1} | PATHS[path]


def _changed_bytes(draw):
    path, fields = _good(draw)
    body = bytearray(json.dumps(fields).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body))
        body[at : at + draw.randint(0, 4)] = bytes(draw.choices(range(256), k=draw.randint(0, 3)))
    try:
        json.loads(bytes(body))
    except (ValueError, RecursionError):
        return "POST", request(path, bytes(body))
    return "POST", request(path, bytes(body[:-1]))  # which may well be good with it


def _wrong_value(draw):
    path, fields = _good(draw)
    names = [name for name in _WRONG if name not in ("prompt", "messages") or name in fields]
    wrong = _WRONG | (_WRONG_OF_CHATS if "chat" in path else {})
    name = draw.choice([*names, *(_WRONG_OF_CHATS if "chat" in path else ())])
    fields[name] = draw.choice(wrong[name])
    return "POST", request(path, json.dumps(fields).encode()), (400, 404, 413) if name == "model" else (400,)


def _unknown_field(draw):
    path, fields = _good(draw)
    name = "".join(draw.choices(string.printable + "é猫\ud800", k=draw.randint(1, 30))) + "zz"
    fields[name] = draw.choice([1, None, "x", [], {}, True]) or 0
    return "POST", request(path, json.dumps(fields).encode())


def _no_utf8(draw):
    path, fields = _good(draw)
    body = json.dumps(fields).encode()
    at = body.index(b"tiny") + draw.randint(0, 4)
    return "POST", request(path, body[:at] + draw.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80")) + body[at:])


def _nested(draw):
    path, fields = _good(draw)
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    depth = draw.choice((20, 500, 5000, 100_000))
    name = draw.choice(("messages" if "chat" in path else "prompt", "stop", "logit_bias", "zzz"))
    body = json.dumps({**fields, name: "@"}).replace('"@"', opening * depth + "1" + closing * depth)
    return "POST", request(path, body.encode())


def _large_number(draw):
    path, fields = _good(draw)
    number = draw.choice(("1e400", "-1e999", "1" + "0" * 5000, "9" * 4000, "NaN", "Infinity", "-Infinity", "1e", "0x1"))
    name = draw.choice(("max_tokens", "seed", "n", "top_p", "temperature", "threshold", "block_length"))
    return "POST", request(path, json.dumps({**fields, name: "@"}).replace('"@"', number).encode())


def _cut(draw):
    path, fields = _good(draw)
    body = json.dumps(fields).encode()
    return "POST", request(path, body[: draw.randrange(len(body))])


def _other_method(draw):
    method = draw.choice(_OTHERS)
    return method, request(draw.choice(list(PATHS)), b"{}", method), (400, 405)


def _other_path(draw):
    path = "/" + "".join(draw.choices(string.ascii_letters + string.digits + "./%-_~", k=draw.randint(1, 40))) + "zz"
    path = draw.choice(
        (path, "/v1/completions/", "/v1/../etc/passwd", "/v1/models/..%2f..%2fetc", "/%00", "/V1/models")
    )
    method = draw.choice(("GET", "POST"))
    return method, request(path, b"{}", method), (404, 405)


def _other_type(draw):
    path, fields = _good(draw)
    return "POST", request(path, json.dumps(fields).encode(), kind=draw.choice(_TYPES)), (400, 415)


def _bad_head(draw):
    head = draw.choice((
        b"POST /v1/completions\r\n\r\n", b"POST  HTTP/1.1\r\n\r\n", b"\x16\x03\x01 no http\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\0b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 100_000 + b"\r\n\r\n",
        bytes(draw.choices(range(1, 256), k=60)) + b"\r\n\r\n",
    ))  # fmt: skip
    return "POST", head, (400, 415)


def _bad_length(draw):
    path, fields = _good(draw)
    body = json.dumps(fields).encode()
    length = draw.choice(("-1", "x", "1e3", "", "9" * 30, "5, 6"))
    chunked = request(path, b"zz\r\n" + body, more="Transfer-Encoding: chunked\r\n").replace(
        b"Content-Length", b"X-Length"
    )
    return "POST", draw.choice((request(path, body, length=length), chunked)), (400, 413)


class Client:
    """One connection, opened anew where the server has closed it."""

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").split(":")
        self._address, self._socket = (host, int(port)), None

    def send(self, request: Request) -> tuple[int, bytes]:
        """(status, body) of the answer."""
        for again in (True, False):
            fresh = self._socket is None
            self._socket = self._socket or socket.create_connection(self._address, timeout=30)
            try:
                try:
                    self._socket.sendall(request.data)
                except ConnectionError:  # it may have answered, and closed, before all was sent
                    if not fresh and again:
                        raise
                answer = http.client.HTTPResponse(self._socket, method=request.method)
                answer.begin()
                found = answer.status, answer.read()
                if answer.will_close:
                    self.close()
                return found
            except (ConnectionError, http.client.BadStatusLine):  # closed after the answer before
                self.close()
                if fresh or not again:
                    raise
        raise AssertionError

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
