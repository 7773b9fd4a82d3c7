"""What the server refuses, as OpenAI's API says it: {"error": {"message", "type", "param", "code"}}."""

import re

from llada_jax.errors import InputError

_NAMED = re.compile(r"\w+")  # messages of InputError that are of a field begin with its name
_LONGEST = 400  # characters
_RENAMED = {"gen_length": "max_tokens"}


class Refused(Exception):
    """A request that is not served. status: of HTTP. param: the field that is wrong. headers: more of the answer's."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def of_input(error: InputError, fields: set[str]) -> Refused:
    """Status 400 with the error's line, cut if it is long, and the one of `fields` that it begins with."""
    line = " ".join(str(error).split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    found = _NAMED.match(line)
    name = _RENAMED.get(found[0], found[0]) if found else None
    code = "context_length_exceeded" if "(max_length)" in str(error) else None
    return Refused(400, line, name if name in fields else None, code)
