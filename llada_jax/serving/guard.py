"""Who may ask: API keys, compared in constant time; and the count of what was answered."""

import hashlib
import hmac
from collections.abc import Callable, Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llada_jax.errors import InputError
from llada_jax.serving.refusals import Refused
from llada_jax.serving.wire import answer


def read_keys(path: str) -> list[str]:
    """The keys of a file, one a line; lines that begin with # are remarks. Raises InputError naming the file."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{path}: a key may hold printable ASCII without spaces only")
    if not keys:
        raise InputError(f"{path}: no keys")
    return keys


class Guard:
    """ASGI middleware. open_to_all: paths that need no key. answered(path, code): called for each answer; paths other
    than `paths` count as one.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], open_to_all: Collection[str], answered: Callable[[str, int], None],
        paths: Collection[str],
    ):  # fmt: skip
        self._app, self._open, self._answered, self._paths = app, open_to_all, answered, paths
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._answered(path, message["status"])
            await send(message)

        if self._keys and scope["path"] not in self._open and not self._is_known(scope):
            refused = Refused(401, "no valid API key: set Authorization: Bearer KEY", code="invalid_api_key")
            return await answer(refused.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, counted)
        try:
            await self._app(scope, receive, counted)
        except Exception:  # which is answered outside of this
            if not started:
                self._answered(path, 500)
            raise

    def _is_known(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them, whichever it is
        return scheme.lower() == b"bearer" and any(found)


def _digest(key: bytes) -> bytes:
    """Of one length for all keys."""
    return hashlib.sha256(key).digest()
