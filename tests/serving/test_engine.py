"""The engine gives requests of any thread what they would get alone, whatever befalls the others."""

import asyncio
import dataclasses
import queue
import threading
import time

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from llada_jax.checkpoint.weights import Model
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling import decode
from llada_jax.sampling.batching import Request
from llada_jax.serving.engine import Engine
from llada_jax.serving.events import Event, Expired, QueueFull, Stopping
from tests.helpers.waiting import PATIENCE, wait_until

CONFIG = preset("tiny").replace(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
B, ROWS, LENGTH = 4, 4, 40


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, parameters.initialize(CONFIG, jax.random.key(0)))
    return Model(CONFIG, params, None, {})


def engine_of(model, rows=ROWS, **how) -> Engine:
    return Engine(model, rows, LENGTH, **how)


def request(length=6, gen_length=8, block_length=B, **changes) -> Request:
    settings = GenerateConfig(gen_length, block_length=block_length, threshold=0.02, eos_id=-1, **changes)
    return Request(np.arange(length), settings, seed=0)


class Client:
    """Keeps its events. gate: an event that the first callback waits for, on the engine's thread."""

    def __init__(self, gate: threading.Event | None = None, fails=None):
        self.events: list[Event] = []
        self.begun, self.ended, self.gate, self.fails = threading.Event(), threading.Event(), gate, fails

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE)
        if self.fails is not None:
            raise self.fails
        if event.kind in ("done", "error"):
            self.ended.set()

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def last(self) -> Event:
        assert self.ended.wait(PATIENCE)
        return self.events[-1]

    def answer(self) -> np.ndarray:
        """The tokens told, which are those of the last event."""
        answer = self.last().answer
        assert np.array_equal(np.concatenate([e.tokens for e in self.events if e.kind == "block"]), answer.tokens)
        return answer.tokens


def alone(model, *requests: Request) -> list[np.ndarray]:
    """Answers at temperature 0."""
    arguments = [[getattr(each, name) for each in requests] for name in ("prompt", "config")]
    return llada_jax.generate(model.params, model.config, *arguments).tokens


def test_64_requests_at_once_get_what_each_gets_alone(model):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 20, (64, 2))
    requests = [dataclasses.replace(request(gen_length=int(g)), prompt=rng.integers(0, 500, n)) for n, g in lengths]
    clients = [Client() for _ in requests]
    with engine_of(model) as engine:
        submit = [
            threading.Thread(target=engine.submit, args=pair, kwargs={"provisional": i % 9 == 0})
            for i, pair in enumerate(zip(requests, clients, strict=True))
        ]
        for thread in submit:
            thread.start()
        for thread in submit:
            thread.join()
    for client, expected in zip(clients, alone(model, *requests), strict=True):
        assert np.array_equal(client.answer(), expected)
    stats = engine.stats()
    assert (stats.submitted, stats.finished, stats.busy, stats.queued) == (64, 64, 0, 0)
    assert stats.tokens == sum(lengths[:, 1]) and stats.prompt_tokens == sum(lengths[:, 0])
    assert stats.passes and not stats.alive and stats.stopping and not stats.resets


def test_draws_depend_on_the_seed_not_on_the_others(model):
    drawn = dataclasses.replace(request(3, 12, temperature=1.0, top_p=0.9), seed=7)
    clients = [Client() for _ in range(7)]
    with engine_of(model) as engine:
        for i, client in enumerate(clients):
            engine.submit(drawn if i % 3 == 0 else request(i, 5 + i), client)
    first, *others = (client.answer() for client in clients[::3])
    assert all(np.array_equal(first, other) for other in others)


def test_blocks_with_their_steps_and_blocks_as_they_stand(model):
    client, plain = Client(), Client()
    with engine_of(model) as engine:
        engine.submit(request(6, 9), client, provisional=True)
        engine.submit(request(6, 9), plain)
    answer = client.last().answer
    blocks = [event for event in client.events if event.kind == "block"]
    assert [len(event.tokens) for event in blocks] == [2, 4, 3]
    for name, field in (("steps", "written_at"), ("confidence", "confidence")):
        assert np.array_equal(np.concatenate([getattr(event, name) for event in blocks]), getattr(answer, field))
    standing = [event for event in client.events if event.kind == "provisional"]
    assert any(0 < (event.steps < 0).sum() < len(event.steps) for event in standing)
    for before, after in zip(client.events, client.events[1:], strict=False):  # nothing is told twice
        if before.kind == after.kind == "provisional":
            assert not np.array_equal(before.steps, after.steps)
    assert set(plain.kinds) == {"block", "done"}


def test_a_full_queue_refuses_and_says_when_to_come_again(model):
    gate, client, waiting = threading.Event(), Client(), [Client() for _ in range(2)]
    with engine_of(model, rows=1, queue=2) as engine:
        begun = time.monotonic()
        engine.submit(request(), first := Client())
        first.last()
        took = time.monotonic() - begun
        client.gate = gate
        engine.submit(request(), client)
        assert client.begun.wait(PATIENCE)
        for each in waiting:
            engine.submit(request(), each)
        with pytest.raises(QueueFull, match="2 requests wait already") as refused:
            engine.submit(request(), Client())
        assert 0 < refused.value.retry_after < took
        assert engine.stats().rejected == 1 and engine.stats().queued == 2
        gate.set()
        for each in waiting:
            each.last()
        engine.submit(request(), last := Client())
        last.last()


def test_a_cancelled_request_frees_its_row_and_hears_no_more(model):
    gate, running, waits, after = threading.Event(), Client(), Client(), Client()
    running.gate = gate
    with engine_of(model, rows=1) as engine:
        ticket = engine.submit(request(6, 30), running)
        queued = engine.submit(request(), waits)
        engine.submit(request(), after)
        assert running.begun.wait(PATIENCE)
        queued.cancel()
        assert engine.stats().queued == 1  # at once
        ticket.cancel()
        ticket.cancel()
        gate.set()
        after.last()
        ticket.cancel()
        stats = engine.stats()
        assert stats.passes < 30 and (stats.cancelled, stats.finished, stats.busy) == (2, 1, 0)
    assert running.kinds == ["block"] and waits.kinds == []
    assert np.array_equal(after.answer(), *alone(model, request()))


def test_a_row_is_free_after_the_pass_in_which_its_client_left(model, monkeypatch):
    advance, passes, ticket = decode.advance, [], queue.Queue()

    def leaves_in_the_third(*arguments):
        passes.append(None)
        if len(passes) == 3:
            ticket.get(timeout=20).cancel()
        return advance(*arguments)

    monkeypatch.setattr(decode, "advance", leaves_in_the_third)
    with engine_of(model, rows=1) as engine:
        ticket.put(engine.submit(request(6, 30), Client()))
        engine.submit(request(), after := Client())
        after.last()
        assert engine.stats().passes == 3 + after.last().answer.forward_passes + after.last().answer.commit_passes


def test_cancelled_from_its_own_callback(model):
    tickets, heard = queue.Queue(), []

    def on_event(event):
        heard.append(event.kind)
        tickets.get(timeout=PATIENCE).cancel()

    with engine_of(model) as engine:
        tickets.put(engine.submit(request(6, 30), on_event))
    assert heard == ["block"] and engine.stats().cancelled == 1


def test_a_deadline_ends_what_waits_and_what_runs(model):
    late = Client()
    with engine_of(model, rows=1) as engine:
        engine.submit(request(), late, deadline=time.monotonic())
        assert isinstance(late.last().error, Expired) and late.kinds == ["error"]
        deadline = time.monotonic() + 0.2
        running, waits, after = Client(), Client(), Client()

        def slow(event):
            running(event)
            time.sleep(max(deadline - time.monotonic(), 0))

        engine.submit(request(6, 30), slow, deadline=deadline)
        engine.submit(request(), waits, deadline=deadline)
        engine.submit(request(), after, deadline=deadline + 60)
        assert isinstance(running.last().error, Expired) and running.kinds[:-1] == ["block"] * (len(running.kinds) - 1)
        assert isinstance(waits.last().error, Expired) and waits.kinds == ["error"]
        assert after.last().kind == "done"
        assert (engine.stats().expired, engine.stats().finished, engine.stats().busy) == (3, 1, 0)


@pytest.mark.parametrize("error", [RuntimeError("broken"), asyncio.CancelledError()])
def test_a_callback_that_raises_ends_its_own_request(model, error, capsys):
    bad, good = Client(fails=error), [Client() for _ in range(5)]
    with engine_of(model) as engine:
        engine.submit(request(6, 30), bad)
        for each in good:
            engine.submit(request(5, 20), each)
    (expected,) = alone(model, request(5, 20))
    assert all(np.array_equal(each.answer(), expected) for each in good)
    assert bad.kinds == ["block"] and engine.stats().failed == 1 and engine.stats().resets == 0
    assert type(error).__name__ in capsys.readouterr().err


def test_after_an_error_of_the_device_it_goes_on_with_a_fresh_batch(model, monkeypatch, capsys):
    advance, calls, asked = decode.advance, [], threading.Event()

    def fails_once(*arguments):
        assert asked.wait(PATIENCE)
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return advance(*arguments)

    monkeypatch.setattr(decode, "advance", fails_once)
    clients = [Client() for _ in range(6)]
    with engine_of(model, rows=2) as engine:
        for client in clients:
            engine.submit(request(6, 12), client)
        asked.set()
    (expected,) = alone(model, request(6, 12))
    for client in clients[:2]:
        assert str(client.last().error) == "out of memory" and client.kinds[-1] == "error"
        assert client.events[-1].error.__traceback__ is None  # it would keep the batch's arrays
    for client in clients[2:]:
        assert np.array_equal(client.answer(), expected)
    assert (engine.stats().resets, engine.stats().failed, engine.stats().finished) == (1, 2, 4)
    assert "out of memory" in capsys.readouterr().err


def test_stopping(model):
    running, waits = Client(), Client()
    engine = engine_of(model, rows=1)
    engine.submit(request(6, 30), running)
    engine.submit(request(), waits)
    engine.stop()
    engine.stop(grace=0)
    assert running.last().kind == waits.last().kind == "done"
    with pytest.raises(Stopping):
        engine.submit(request(), Client())

    running, waits, gate = Client(), Client(), threading.Event()
    running.gate = gate
    engine = engine_of(model, rows=1)
    engine.submit(request(6, 30), running)
    engine.submit(request(), waits)
    assert running.begun.wait(PATIENCE)

    def go_on_after_the_grace():
        wait_until(lambda: engine.stats().stopping)
        time.sleep(0.05)
        gate.set()

    threading.Thread(target=go_on_after_the_grace).start()
    engine.stop(grace=0.05)
    assert isinstance(running.last().error, Stopping) and isinstance(waits.last().error, Stopping)
    assert running.kinds == ["block", "error"] and waits.kinds == ["error"] and not engine.stats().alive

    engine = engine_of(model)
    engine.submit(request(), lambda event: engine.stop())  # on its own thread: does not wait for itself
    wait_until(lambda: not engine.stats().alive)
    with pytest.raises(RuntimeError), engine_of(model, rows=1) as engine:
        engine.submit(request(6, 30), Client())
        raise RuntimeError("of the server")
    assert not engine.stats().alive


def test_requests_that_cannot_share_a_batch_take_turns(model):
    """First come, first served: what could join waits behind what cannot."""
    ended, clients, gate = [], {}, threading.Event()
    asked = {"a": request(6, 20), "b": request(6, 8, 8), "c": request(6, 4)}
    with engine_of(model) as engine:
        for name, each in asked.items():
            clients[name] = client = Client(gate if name == "a" else None)

            def on_event(event, name=name, client=client):
                ended.extend(name * (event.kind == "done"))
                client(event)

            engine.submit(each, on_event)
        gate.set()
    assert ended == ["a", "b", "c"] and engine.stats().resets == 0
    assert np.array_equal(clients["b"].answer(), *alone(model, asked["b"]))


def test_refuses_what_could_never_run(model):
    other = Model(CONFIG.replace(mask_token_id=None), *model[1:])
    with engine_of(model) as engine, engine_of(other) as maskless:
        for wrong, message in (
            (request(30, 11), "^30 prompt tokens and gen_length=11, expected at most 40 together"),
            (dataclasses.replace(request(), seed=-1), "^seed=-1"),
            (dataclasses.replace(request(), prompt=np.array([512])), "outside the vocabulary"),
            (request(mask_id=600), "mask_id=600"),
            (request(rule="llada2.2"), "rule=llada2.2: the checkpoint names no token that deletes"),
        ):
            with pytest.raises(InputError, match=message):
                engine.submit(wrong, Client())
        with pytest.raises(InputError, match="no mask token"):
            maskless.submit(request(), Client())
        assert engine.stats().submitted == 0
    for name, value in (("queue", 0), ("rows", 0), ("prefix_bytes", 100), ("prefix_bytes", -1)):
        with pytest.raises(InputError, match=f"{name}={value}, .*expected at least"):
            engine_of(model, **{name: value})


def test_sleeps_while_there_is_nothing_to_do(model):
    with engine_of(model) as engine:
        engine.submit(request(), client := Client())
        client.last()
        wait_until(lambda: engine.stats().busy == 0)
        clock = time.pthread_getcpuclockid(engine._thread.ident)  # other threads may work
        begun, passes = time.clock_gettime(clock), engine.stats().passes
        time.sleep(0.3)
        assert time.clock_gettime(clock) - begun < 0.1 and engine.stats().passes == passes


def test_a_prompt_that_begins_like_another_is_not_computed_again(model):
    (expected,) = alone(model, request(30))
    with engine_of(model, prefill_chunk=8, prefix_bytes=2**20) as engine:
        reused = []
        for _ in range(2):
            engine.submit(request(30), client := Client())
            assert np.array_equal(client.answer(), expected)
            reused.append(client.last().answer.reused_tokens)
        stats = engine.stats()
    assert reused == [0, 24] and (stats.prefix_hits, stats.prefix_misses) == (3, 3) and stats.prefix_bytes > 0
    assert (engine.stats().prefix_hits, engine.stats().prefix_bytes) == (3, 0)  # all is given back at the end
