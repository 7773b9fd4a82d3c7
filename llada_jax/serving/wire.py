"""Values as JSON that can always be sent."""

import json

from starlette.responses import Response


def as_json(value: dict) -> bytes:
    """In UTF-8; a lone surrogate as JSON's escape, which is Python's too."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def answer(value: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, "application/json")
