"""The server under load, beside decoding the same requests without it."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from llada_jax.bench import clients
from llada_jax.bench.decode import ragged_requests
from llada_jax.checkpoint.weights import Model
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling import batching
from llada_jax.sampling.generate import prefill_execution

try:
    from llada_jax.serving import listen
    from llada_jax.serving.app import Options, make_app
    from llada_jax.serving.engine import Engine
except ModuleNotFoundError as error:
    raise InputError(f"{error.name} is not installed; pip install 'llada_jax[serve]'") from error

LONGEST = 64 + 192  # of the ragged requests
LEAST = 0.9  # of the throughput without a server


def table(name: str, rows: int, count: int, at_once: int, rounds: int) -> Iterator[dict]:
    """Prints and yields tokens per second of `count` ragged requests over `rows` rows, in turn without a server and by
    `at_once` clients of one, and the seconds until their first blocks. The fastest of `rounds` counts, after two more
    that may compile.
    """
    config = preset(name)
    params = parameters.initialize(config, jax.random.key(0))
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params)  # logits with some spread: few near ties
    model = Model(config, params, byte_tokenizer(config.eos_token_id, config.mask_token_id), {})
    requests = [dataclasses.replace(request, seed=i) for i, request in enumerate(ragged_requests(config, count))]
    bodies = [_body(request) for request in requests]
    print(f"{jax.devices()[0].device_kind}, {name}, random weights; {count} requests, {rows} rows, {at_once} clients")
    found = []
    with _served(model, rows, at_once) as port, _process() as pool:
        for number in range(-2, rounds):
            alone = _alone(model, requests, rows)
            asked, seconds = pool.submit(clients.ask_all, port, bodies, at_once).result()
            if (tokens := sum(each.tokens for each in asked)) != alone[0]:
                raise RuntimeError(f"{tokens} tokens by the server, {alone[0]} without")
            if number >= 0:
                found.append((alone[1], seconds, [each.first_block for each in asked]))
    without, by_server = min(each[0] for each in found), min(each[1] for each in found)
    waits = next(each[2] for each in found if each[1] == by_server)
    p50, p99 = np.percentile(waits, (50, 99))
    ratio = without / by_server
    print(
        f"{tokens} tokens: {tokens / without:.0f} a second without a server, {tokens / by_server:.0f} by it: "
        f"{ratio:.3f}, at least {LEAST}: {'met' if ratio >= LEAST else 'MISSED'}\n"
        f"until the first block: {p50:.3f} s at the median, {p99:.3f} s at the 99th percentile",
        flush=True,
    )
    yield {
        "model": name, "rows": rows, "requests": count, "clients": at_once, "tokens": tokens, "ratio": ratio,
        "alone": tokens / without, "served": tokens / by_server, "first_block_p50": p50, "first_block_p99": p99,
    }  # fmt: skip


def _body(request: batching.Request) -> dict:
    g = request.config
    own = {"block_length": g.block_length, "steps": g.steps, "threshold": g.threshold, "temperature": g.temperature}
    prompt = request.prompt.tolist()
    common = {"model": "model", "prompt": prompt, "max_tokens": g.gen_length, "seed": request.seed}
    return common | own | {"ignore_eos": True}


def _alone(model: Model, requests: list[batching.Request], rows: int) -> tuple[int, float]:
    """(tokens, seconds) without a server, texts included."""
    begin = time.perf_counter()
    answers = batching.serve(
        model.params, model.config, requests, rows, LONGEST, model.tokenizer, execution=prefill_execution(LONGEST)
    )
    return sum(len(answer.tokens) for answer in answers), time.perf_counter() - begin


@contextlib.contextmanager
def _served(model: Model, rows: int, at_once: int) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    options = Options(names=("model",), defaults=ragged_requests(model.config, 1)[0].config, max_length=LONGEST)
    ready = threading.Event()
    with Engine(model, rows, LONGEST, queue=at_once) as engine, listen.bind("127.0.0.1", 0) as bound:
        server = listen.Server(make_app(engine, model, options), ready=ready.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        ready.wait()
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def _process() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
