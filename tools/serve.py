"""Serves a model over HTTP, as OpenAI's API does: /v1/completions and /v1/chat/completions.

python tools/serve.py --checkpoint=DIR [--port=8000] [--max_rows=8] [--canvas=2048] [--api_key_file=FILE]

Flags of decoding are the defaults for requests that do not say; --gen_length that of max_tokens. At / is a page for
browsers, at /metrics what Prometheus reads, at /health whether it runs. llada_jax/serving/README.md tells what requests
may hold. Needs the extra: pip install -e '.[serve]'. It ends by SIGTERM or Ctrl-C, after what runs has finished.
DIR: a converted checkpoint, a training step, or a workdir (its newest good step).
"""

import importlib.util
import ipaddress
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.errors import InputError
from llada_jax.sampling import decoding_flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; any other than this machine's needs keys.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 is a free one.", 0, 65535)
_ROWS = flags.DEFINE_integer("max_rows", 8, "Requests decoded together.", lower_bound=1)
_CANVAS = flags.DEFINE_integer(
    "canvas", None, "Most tokens of a prompt and its answer. Default: the model's maximum, at most 4096.", lower_bound=2
)
_QUEUE = flags.DEFINE_integer("queue", 64, "Most requests that wait; more are refused.", lower_bound=1)
_ADMIT_EVERY = flags.DEFINE_integer(
    "admit_every", 1, "Passes between two looks at who has come, left or finished; more are less work of the host.", 1
)
_PREFIX_MB = flags.DEFINE_integer(
    "prefix_mb", 0, "Memory of each device for beginnings of long prompts, MB.", lower_bound=0
)
_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", None, "Tokens of a longer prompt that are computed, and known, at once.", lower_bound=1
)
_NAME = flags.DEFINE_list("model_name", None, "What requests call the model, first its name. Default: the folder's.")
_KEYS = flags.DEFINE_string("api_key_file", None, "File of the keys that clients may have, one a line.")
_ANYONE = flags.DEFINE_bool("allow_anyone", False, "Serve other machines without keys.")
_ORIGINS = flags.DEFINE_list("allow_origins", [], "Sites whose pages in browsers may ask (CORS), * for all.")
_DEADLINE = flags.DEFINE_float("deadline", 600.0, "Seconds for a request, its wait included.", lower_bound=0.1)
_GRACE = flags.DEFINE_float("grace", None, "Seconds for what runs to finish at the end. Default: as it takes.", 0)
_MOST_BYTES = flags.DEFINE_integer("max_body", 4 << 20, "Most bytes of a request's body.", lower_bound=1)
_WARM_UP = flags.DEFINE_bool("warm_up", True, "Answer a few requests before it listens: compiling takes its time.")
decoding_flags.define(gen_length=256)


def main(argv) -> None:
    del argv
    if not _CHECKPOINT.value:
        raise InputError("--checkpoint=DIR is required; see --help")
    for name in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed; pip install 'llada_jax[serve]'")
    if not (_KEYS.value or _ANYONE.value or _is_this_machine(_HOST.value)):
        raise InputError(f"--host={_HOST.value} is open to other machines: give --api_key_file=FILE, or --allow_anyone")
    from llada_jax.serving import guard, listen

    keys = guard.read_keys(_KEYS.value) if _KEYS.value else []
    defaults = decoding_flags.generate_config()
    with listen.bind(_HOST.value, _PORT.value) as bound:
        _serve(bound, keys, defaults)


def _serve(bound, keys: list[str], defaults) -> None:
    # After the flags are right: jax takes seconds.
    from llada_jax.checkpoint.weights import load_checkpoint, read_config
    from llada_jax.sampling.state import PREFILL_CHUNK
    from llada_jax.serving import listen
    from llada_jax.serving.app import Options, make_app
    from llada_jax.serving.engine import Engine

    config = read_config(_CHECKPOINT.value)[0]
    canvas = _CANVAS.value or min(config.max_position_embeddings, 4096)
    if canvas > config.max_position_embeddings:
        raise InputError(f"--canvas={canvas}: the model was made for {config.max_position_embeddings} positions")
    names = _NAME.value or [Path(_CHECKPOINT.value).resolve().name]
    options = Options(
        names=names, defaults=defaults, max_length=canvas, deadline=_DEADLINE.value, most_bytes=_MOST_BYTES.value,
        keys=keys, origins=_ORIGINS.value,
    )  # fmt: skip
    with decoding_flags.mesh(config, _ROWS.value) as mesh:
        model = decoding_flags.with_bos(load_checkpoint(_CHECKPOINT.value, mesh=mesh))
        model = decoding_flags.with_experts_dtype(model)
    engine = Engine(
        model, _ROWS.value, canvas, queue=_QUEUE.value, admit_every=_ADMIT_EVERY.value,
        prefix_bytes=_PREFIX_MB.value * 10**6, prefill_chunk=_CHUNK.value or PREFILL_CHUNK, mesh=mesh,
    )  # fmt: skip
    with engine:
        app = make_app(engine, model, options)
        if _WARM_UP.value:
            _warm_up(engine, defaults, canvas)
        limits = listen.Limits(grace=_GRACE.value)
        listen.run(app, bound, limits, lambda: print(_ready_line(bound, names, canvas), flush=True))


def _warm_up(engine, defaults, canvas: int) -> None:
    """Has the engine answer requests without and with a prompt to compute, and so compile; one more, since over a mesh
    the first one's results are laid out in their own way. Raises a request's error.
    """
    import dataclasses
    import queue

    import numpy as np

    from llada_jax.sampling.batches.requests import Request

    block, events = defaults.block_length, queue.SimpleQueue()
    config = dataclasses.replace(defaults, gen_length=min(defaults.gen_length, block, canvas - 1))
    for length in (1, 1, min(block, canvas - config.gen_length)):
        engine.submit(Request(np.zeros(length, np.int32), config, 0), events.put)
        while (event := events.get()).kind != "done":
            if event.kind == "error":
                raise event.error


def _ready_line(bound, names: list[str], canvas: int) -> str:
    host, port = bound.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    return f"http://{where}:{port} serves {names[0]}: {_ROWS.value} at once, {canvas} tokens each"


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    command_line.run(main)
