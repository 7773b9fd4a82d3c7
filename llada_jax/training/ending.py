"""How the processes of a run end together: what fails in one of them would leave the others waiting for it for ever.

Three things end a run of several processes before its time:
- an error in one of them, which it publishes at the coordination service; the others wait for that beside their work;
- a process that is killed: collectives over TCP fail at once where it was, and those processes publish that;
- a host that falls silent: after --peer_timeout the coordination service aborts all others, naming it, as it does when
  its own process, 0, is gone.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback

import jax

from llada_jax import errors
from llada_jax.training import hosts
from llada_jax.training.hosts import LOST_PEER, WEEK_MS

_OUTCOME = "llada_jax/outcome"  # what ended the run, JSON
_FAREWELL_MS = 10_000
_TCP_COLLECTIVES = "Gloo"  # in the errors of collectives between CPUs
_leaving = threading.Lock()


@contextlib.contextmanager
def ending_together():
    """An error that ends the body in one process ends all of them, with its message and its exit code.

    The code is 2 for an InputError, as in errors.run, LOST_PEER when a process is gone, else 1. To be left by the whole
    program: a process that fails exits here. With one process, errors pass as they are.
    """
    client = hosts.coordination_client()
    if client is None:
        yield
        return
    watcher = threading.Thread(target=_end_with_others, args=(client,), name="outcome", daemon=True)
    watcher.start()
    try:
        yield
        client.wait_at_barrier("llada_jax/finished", WEEK_MS)
    except BaseException as error:
        message, code = _report(error)
        _publish(client, {"process": jax.process_index(), "message": message, "code": code})
        _leave(client, code)
    _publish(client, {})
    watcher.join()


def _report(error: BaseException) -> tuple[str, int]:
    """Prints what ended this process; returns it as a line, and the exit code."""
    line = " ".join(str(error).split())
    if (code := errors.report(error)) is not None:
        return line, code
    if isinstance(error, jax.errors.JaxRuntimeError) and _TCP_COLLECTIVES in line:
        line = f"another process is gone ({line[:160]}); start all of them again, they go on from the last checkpoint"
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
    if outcome.get("process") in (None, jax.process_index()):
        return
    print(f"error: process {outcome['process']}: {outcome['message']}", file=sys.stderr)
    _leave(client, outcome["code"])


def _publish(client, outcome: dict) -> None:
    """The first outcome stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(_OUTCOME, json.dumps(outcome))


def _leave(client, code: int) -> None:
    """Exits without waiting for threads or devices that may hang: when all processes do, or after a while."""
    _leaving.acquire()  # never released: one thread does it
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier("llada_jax/farewell", _FAREWELL_MS)
    if jax.process_index() == 0:
        time.sleep(1.0)  # with this process goes the coordination service, and a process that has lost it aborts
    os._exit(code)
