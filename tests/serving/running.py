"""A server in a thread of the test's process, over a model of one layer; and its answers without a server."""

import contextlib
import dataclasses
import socket
import threading
from types import SimpleNamespace

import httpx
import jax
import numpy as np
import openai

from llada_jax.checkpoint.weights import Model
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import GenerateConfig
from llada_jax.serving import listen
from llada_jax.serving.app import Options, make_app
from llada_jax.serving.engine import Engine
from llada_jax.serving.events import Event, Expired, Stats
from llada_jax.tokenizer import from_files
from tests.helpers.waiting import PATIENCE, wait_until

TEMPLATE = (
    b"{% if messages[0].content == 'raise' %}{{ raise_exception('not so') }}{% endif %}"
    b"{% if tools %}tools {{ tools | tojson }}|{% endif %}"
    b"{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    b"{% if add_generation_prompt %}assistant:{% endif %}"
)
DEFAULTS = GenerateConfig(gen_length=8, block_length=4, steps=4, threshold=2.0)
LONGEST = 256


def small_model() -> Model:
    """Random weights; it mostly writes printable ASCII, and ends of sequence."""
    config = preset("tiny").replace(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
    params = parameters.initialize(config, jax.random.key(0, impl="threefry2x32"))
    params = jax.tree.map(lambda w: 3 * w if w.ndim > 2 else w, params)
    ids = np.arange(config.vocab_size)
    params["head"] *= 40.0 * ((ids >= 32) & (ids < 127) | (ids == config.eos_token_id))[None]
    files = byte_tokenizer(config.eos_token_id, config.mask_token_id).files | {"chat_template.jinja": TEMPLATE}
    return Model(config, params, from_files(files), {})


@contextlib.contextmanager
def served(
    model: Model, rows: int = 4, queue: int = 64, limits=listen.Limits(), engine=None, send_buffer=None, **options
):
    """A running server: url, client (openai's), http (httpx's), engine, model."""
    engine = engine or Engine(model, rows, LONGEST, queue=queue)
    settings = Options(**({"names": ("tiny", "alias"), "defaults": DEFAULTS, "max_length": LONGEST} | options))
    server = listen.Server(make_app(engine, model, settings), limits)
    with listen.bind("127.0.0.1", 0) as bound:
        if send_buffer:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        wait_until(lambda: server.started)
        key = settings.keys[0] if settings.keys else "none"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE)
        try:
            yield SimpleNamespace(url=url, client=client, http=http, engine=engine, model=model, server=server)
        finally:
            client.close()
            http.close()
            server.should_exit = True
            thread.join()
            engine.stop(0)


def alone(model: Model, ids, seed=0, **changes):
    """The Answer to one prompt without a server."""
    request = Request(np.asarray(ids, np.int32), dataclasses.replace(DEFAULTS, **changes), seed)
    (answer,) = serve(model.params, model.config, [request], 1, LONGEST, model.tokenizer)
    return answer


class Scripted:
    """In place of an engine: answers what it is told to. A request that nothing is said of waits."""

    def __init__(self):
        self.says, self.submitted, self.cancelled, self.requests = None, 0, 0, []

    def submit(self, request, on_event, provisional=False, deadline=None):
        if isinstance(self.says, Exception) and not isinstance(self.says, Expired | InputError | RuntimeError):
            raise self.says
        self.submitted += 1
        self.requests.append((request, deadline))
        for event in [Event("error", error=self.says)] if isinstance(self.says, Exception) else self.says or ():
            on_event(event)
        return self

    def cancel(self):
        self.cancelled += 1

    def stats(self):
        return Stats(**dict.fromkeys(Stats.__dataclass_fields__, 0) | {"alive": True, "stopping": False, "queue": 8})

    def stop(self, grace=None):
        pass
