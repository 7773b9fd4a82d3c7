"""How the processes of a run end together: what fails in one of them would leave the others waiting for it for ever.

- An error in one of them is published at JAX's coordination service, where the others wait for it beside their work.
- A killed process makes collectives over TCP fail at once; the processes that see it publish that.
- Of a host that falls silent, process 0 publishes that after --peer_timeout.
When process 0 itself is gone the coordination service is, and JAX aborts the others, saying so.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback

import jax

from llada_jax import errors
from llada_jax.runtime import distributed
from llada_jax.runtime.distributed import LOST_PEER, WEEK_MS

_OUTCOME = "llada_jax/outcome"  # what ended the run, JSON
_PULSE = "llada_jax/pulse/"
_FAREWELL_MS = 3_000
_TCP_COLLECTIVES = "Gloo"  # in the errors of collectives between CPUs
_AGAIN = "start all of them again, they go on from the last checkpoint"
_leaving = threading.Lock()


@contextlib.contextmanager
def ending_together(peer_timeout: float):
    """An error that ends the body in one process ends all of them, with its message and its exit code.

    The code is 2 for an InputError, as in command_line.run, LOST_PEER when a process is gone or silent for
    `peer_timeout` seconds, else 1. To be left by the whole program: a process that fails exits here. With one
    process, errors pass as they are.
    """
    client = distributed.coordination_client()
    if client is None:
        yield
        return
    over = threading.Event()
    threads = [
        threading.Thread(target=_end_with_others, args=(client,), name="outcome", daemon=True),
        threading.Thread(target=_watch_pulse, args=(client, peer_timeout, over), name="pulse", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
        client.wait_at_barrier("llada_jax/finished", WEEK_MS)
    except BaseException as error:
        _leaving.acquire()  # never released: one thread ends the process, and says why
        message, code = _report(error)
        _publish(client, {"message": f"process {jax.process_index()}: {message}", "code": code})
        _leave(client, code)
    over.set()
    _publish(client, {})
    for thread in threads:
        thread.join()


def _report(error: BaseException) -> tuple[str, int]:
    """Prints what ended this process; returns it as a line, and the exit code."""
    line = " ".join(str(error).split())
    if (code := errors.report(error)) is not None:
        return line, code
    if isinstance(error, jax.errors.JaxRuntimeError) and _TCP_COLLECTIVES in line:
        line = f"lost touch with another process ({line[:160]}); {_AGAIN}"
        print(f"error: {line}", file=sys.stderr)
        return line, LOST_PEER
    traceback.print_exception(error)
    return f"{type(error).__name__}: {line}", 1


def _end_with_others(client) -> None:
    """Waits for the outcome of the run; when another process has failed, ends this one."""
    try:
        outcome = json.loads(client.blocking_key_value_get(_OUTCOME, WEEK_MS))
    except jax.errors.JaxRuntimeError:
        return  # the coordination service is gone, which ends this process
    if outcome:
        _leaving.acquire()
        print(f"error: {outcome['message']}", file=sys.stderr)
        _leave(client, outcome["code"])


def _watch_pulse(client, timeout: float, over: threading.Event) -> None:
    """Says now and then that this process is alive; process 0 publishes who has not said so for `timeout` seconds."""
    heard: dict[str, tuple[str, float]] = {}  # by process: its last word, and when that was new
    for count in itertools.count():
        try:
            client.key_value_set(f"{_PULSE}{jax.process_index()}", str(count), allow_overwrite=True)
            words = client.key_value_dir_get(_PULSE) if jax.process_index() == 0 else []
        except jax.errors.JaxRuntimeError:
            return
        for key, word in words:
            if heard.get(key, ("", 0.0))[0] != word:
                heard[key] = word, time.monotonic()
        silent = [key for key, (_, since) in heard.items() if time.monotonic() - since > timeout]
        if silent:
            who = silent[0].removeprefix(_PULSE)
            message = f"process {who}: no sign of life for {timeout:g} seconds; {_AGAIN}"
            _publish(client, {"message": message, "code": LOST_PEER})
        if silent or over.wait(timeout / 5):
            return


def _publish(client, outcome: dict) -> None:
    """The first outcome stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(_OUTCOME, json.dumps(outcome))


def _leave(client, code: int) -> None:
    """Exits without waiting for threads or devices that may hang: when all processes do, or after a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier("llada_jax/farewell", _FAREWELL_MS)
    if jax.process_index() == 0:
        time.sleep(1.0)  # with this process goes the coordination service, and a process that has lost it aborts
    os._exit(code)
