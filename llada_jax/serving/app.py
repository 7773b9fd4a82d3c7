"""The server's routes, as a Starlette app over an engine. What a client does wrong is refused in OpenAI's form."""

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import Coroutine, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from llada_jax.checkpoint.weights import Model
from llada_jax.errors import InputError
from llada_jax.sampling.batches import requests
from llada_jax.sampling.generate import GenerateConfig, eos_ids_of
from llada_jax.serving import asked, page, refusals
from llada_jax.serving.answers import Form
from llada_jax.serving.choices import Choice, usage
from llada_jax.serving.engine import Engine
from llada_jax.serving.events import Expired, QueueFull, Stopping
from llada_jax.serving.guard import Guard
from llada_jax.serving.job import Job
from llada_jax.serving.metrics import CONTENT_TYPE, Metrics
from llada_jax.serving.prepare import Prepared, prepare
from llada_jax.serving.refusals import Refused
from llada_jax.serving.tool_calls import markers_of
from llada_jax.serving.wire import answer, as_json

_PAUSE = 15.0  # seconds between signs of life, that proxies do not take a stream for dead
_GONE = 499  # as nginx has it; nobody reads it, but metrics count it
_OF_PAGE = {"Content-Security-Policy": "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"}
_KINDS = {"/v1/completions": asked.Completion, "/v1/chat/completions": asked.Chat}


@dataclasses.dataclass(frozen=True)
class Options:
    """names: of the model, the first one is told, all are accepted. defaults: of decoding. max_length: the engine's.
    deadline: seconds for a request, its wait included. most_bytes: of a body. keys: one of which a client must have,
    if there are any. origins: whose pages in browsers may ask (CORS).
    """

    names: Sequence[str]
    defaults: GenerateConfig
    max_length: int
    deadline: float = 600.0
    most_bytes: int = 4 << 20
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()


def make_app(engine: Engine, model: Model, options: Options) -> Starlette:
    """The app. Raises InputError if the model has no tokenizer."""
    if model.tokenizer is None:
        raise InputError("the checkpoint has no tokenizer, which a server needs")
    service = _Service(engine, model, options)
    routes = [
        Route("/", service.page),
        *(Route(path, service.complete, methods=["POST"]) for path in _KINDS),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    guard = Middleware(
        Guard, keys=options.keys, open_to_all=("/", "/health"), answered=service.told.answered,
        paths={route.path for route in routes},
    )  # fmt: skip
    cors = Middleware(CORSMiddleware, allow_origins=options.origins, allow_methods=["*"], allow_headers=["*"])
    handlers = {Refused: _refused, HTTPException: _unknown, Exception: _failed}
    app = Starlette(False, routes, [cors, guard] if options.origins else [guard], handlers)
    app.router.redirect_slashes = False  # a path is one of these, or there is nothing
    return app


async def _refused(_: Request, error: Refused) -> Response:
    return answer(error.body, error.status, error.headers)


async def _unknown(_: Request, error: HTTPException) -> Response:
    text = {404: "there is nothing at this path", 405: "this path takes another method"}.get(error.status_code)
    return answer(Refused(error.status_code, text or error.detail).body, error.status_code, dict(error.headers or {}))


async def _failed(_: Request, __: Exception) -> Response:
    return answer(Refused(500, "the server failed; its log says why").body, 500)


def _refusal(error: Exception) -> Refused:
    """What the client is told of an error of the engine."""
    match error:
        case Refused():
            return error
        case QueueFull():
            wait = str(max(math.ceil(error.retry_after), 1))
            return Refused(429, "the server is busy: " + str(error), code="queue_full", headers={"Retry-After": wait})
        case Stopping():
            return Refused(503, "the server is stopping", code="stopping")
        case Expired():
            return Refused(504, "the answer took longer than this server's deadline", code="deadline_exceeded")
        case InputError():
            return refusals.of_input(error, {*asked.Chat.model_fields, *asked.Completion.model_fields})
    return Refused(500, "the device failed; the server's log says why", code="device_error")


class _Service:
    def __init__(self, engine: Engine, model: Model, options: Options):
        self._engine, self._model, self._options = engine, model, options
        self._began, self._markers = int(time.time()), markers_of(model.tokenizer)
        self.told = Metrics(engine.stats)
        self._page = Response(page.read(), headers=_OF_PAGE, media_type="text/html")

    async def page(self, _: Request) -> Response:
        return self._page

    async def models(self, request: Request) -> Response:
        options = self._options
        entries = [
            {"id": name, "object": "model", "created": self._began, "owned_by": "llada_jax"}
            | {"max_model_len": options.max_length}
            for name in options.names
        ]
        if (name := request.path_params.get("name")) is None:
            return answer({"object": "list", "data": entries})
        self._check_model(name)
        return answer(next(entry for entry in entries if entry["id"] == name))

    async def health(self, _: Request) -> Response:
        stats = self._engine.stats()
        well = stats.alive and not stats.stopping
        counts = {name: getattr(stats, name) for name in ("rows", "busy", "queue", "queued")}
        return answer({"status": "ok" if well else "stopping"} | counts, 200 if well else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self.told.text(), headers={"content-type": CONTENT_TYPE})

    async def complete(self, request: Request) -> "Response | _Stream":
        began = time.monotonic()
        kind = _KINDS[request.url.path]
        body = await self._body(request)
        wanted, prepared = await asyncio.to_thread(self._prepared, kind, body)  # long texts take their time
        detailed = wanted.provisional or wanted.alternatives is not None
        markers = self._markers if kind is asked.Chat and wanted.offered else None
        choices = [
            Choice(i, self._model.tokenizer, each.prompt.tolist(), wanted.stop, self._ends(each), detailed, markers)
            for i, each in enumerate(prepared.requests)
        ]
        try:
            job = Job(
                self._engine, prepared.requests, choices, wanted.provisional, began + self._options.deadline,
                lambda: self.told.first_block(began),
            )  # fmt: skip
        except (QueueFull, Stopping, InputError) as error:
            raise _refusal(error) from None
        kind_name = "chatcmpl" if kind is asked.Chat else "cmpl"
        name = f"{kind_name}-{secrets.token_hex(12)}"
        form = Form(wanted, self._options.names[0], name, int(time.time()), prepared.echoes)

        def ended() -> dict:
            self.told.finished(began)
            return usage(choices, prepared.prompt_tokens, time.monotonic() - began)

        if wanted.stream:
            return _Stream(job, form, ended, len(choices))
        try:
            return await _unless_gone(request.receive, _whole(job, form, choices, ended)) or Response(status_code=_GONE)
        finally:
            job.cancel()

    def _ends(self, request: requests.Request) -> set[int]:
        return {end for end in eos_ids_of(self._model.config, request.config) if end >= 0}

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON: set Content-Type: application/json")
        most, body = self._options.most_bytes, bytearray()
        too_long = Refused(413, f"the body has more than {most} bytes", code="body_too_large")
        if request.headers.get("content-length", "0").isdecimal():
            if int(request.headers.get("content-length", "0")[:20]) > most:
                raise too_long
        try:
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_long
        except ClientDisconnect:
            raise Refused(_GONE, "the client is gone") from None
        return bytes(body)

    def _prepared(self, kind: type, body: bytes) -> tuple[asked.Asked, Prepared]:
        wanted = asked.read(kind, body)
        self._check_model(wanted.model)
        prepared = prepare(wanted, self._model.tokenizer, self._options.defaults, self._options.max_length)
        if len(prepared.requests) > (most := self._engine.stats().queue):
            raise Refused(400, f"{len(prepared.requests)} answers at once: at most {most}", "n", "invalid_value")
        return wanted, prepared

    def _check_model(self, name: str) -> None:
        if name not in self._options.names:
            known = ", ".join(self._options.names)
            raise Refused(404, f"there is no model {name[:100]!r} here, but {known}", "model", "model_not_found")


async def _whole(job: Job, form: Form, choices: Sequence[Choice], ended) -> Response:
    texts = [""] * len(choices)
    try:
        async for deltas in job.deltas():
            for delta in deltas:
                texts[delta.index] += delta.text
    except Exception as error:
        raise _refusal(error) from None
    return answer(form.whole(choices, texts, ended()))


class _Stream:
    """The chunks of a job as server-sent events."""

    def __init__(self, job: Job, form: Form, ended, count: int):
        self._job, self._form, self._ended, self._count = job, form, ended, count

    async def __call__(self, scope, receive, send) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        finally:
            self._job.cancel()

    async def _send(self, send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(chunks) -> None:
            data = b"".join(b"data: " + as_json(chunk) + b"\n\n" for chunk in chunks if chunk is not None)
            await send({"type": "http.response.body", "body": data or b": still here\n\n", "more_body": True})

        try:
            await say([self._form.first(i) for i in range(self._count)])
            async for deltas in self._job.deltas(_PAUSE):
                await say([chunk for delta in deltas for chunk in self._form.chunks(delta)])
            await say([self._form.last(self._ended())])
        except Exception as error:
            await say([_refusal(error).body])
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _unless_gone(receive, work: Coroutine):
    """What the work returns; None if the client is gone before, and the work is given up then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
