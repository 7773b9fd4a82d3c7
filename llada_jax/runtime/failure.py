"""A failure of one process ends all processes of a run; otherwise the others would wait for it for ever.

- A process that raises an error publishes it at JAX's coordination service, where a thread of each process waits.
- A killed process makes collectives over TCP fail at once; the processes that notice publish it.
- A host that falls silent is published by process 0 after --peer_timeout.
Without process 0 there is no coordination service, and JAX aborts the others with a message.
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
_HEARTBEAT = "llada_jax/heartbeat/"
_EXIT_BARRIER_MS = 3_000
_TCP_COLLECTIVES = "Gloo"  # in the errors of collectives between CPUs
_RESTART = "start all processes again, they resume from the last checkpoint"
_exiting = threading.Lock()


@contextlib.contextmanager
def failing_together(peer_timeout: float):
    """An error that leaves the body in one process ends all processes, with its message and its exit code.

    The code is 2 for an InputError, as in command_line.run; LOST_PEER if a process is gone or silent for `peer_timeout`
    seconds; else 1. The body must be the whole program, since a process that fails exits here. With one process, errors
    are raised unchanged.
    """
    client = distributed.coordination_client()
    if client is None:
        yield
        return
    finished = threading.Event()
    threads = [
        threading.Thread(target=_fail_with_others, args=(client,), name="outcome", daemon=True),
        threading.Thread(
            target=_watch_heartbeats, args=(client, peer_timeout, finished), name="heartbeat", daemon=True
        ),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
        client.wait_at_barrier("llada_jax/finished", WEEK_MS)
    except BaseException as error:
        _exiting.acquire()  # never released: one thread ends the process, and says why
        message, code = _report(error)
        _publish(client, {"message": f"process {jax.process_index()}: {message}", "code": code})
        _exit(client, code)
    finished.set()
    _publish(client, {})
    for thread in threads:
        thread.join()


def _report(error: BaseException) -> tuple[str, int]:
    """Prints the error that ended this process; returns it as one line, and the exit code."""
    line = " ".join(str(error).split())
    if (code := errors.report(error)) is not None:
        return line, code
    if isinstance(error, jax.errors.JaxRuntimeError) and _TCP_COLLECTIVES in line:
        line = f"lost touch with another process ({line[:160]}); {_RESTART}"
        print(f"error: {line}", file=sys.stderr)
        return line, LOST_PEER
    traceback.print_exception(error)
    return f"{type(error).__name__}: {line}", 1


def _fail_with_others(client) -> None:
    """Waits for the outcome of the run; ends this process if another one failed."""
    try:
        outcome = json.loads(client.blocking_key_value_get(_OUTCOME, WEEK_MS))
    except jax.errors.JaxRuntimeError:
        return  # the coordination service is gone, which ends this process
    if outcome:
        _exiting.acquire()
        print(f"error: {outcome['message']}", file=sys.stderr)
        _exit(client, outcome["code"])


def _watch_heartbeats(client, timeout: float, finished: threading.Event) -> None:
    """Sends heartbeats of this process; process 0 publishes a process without one for `timeout` seconds."""
    seen: dict[str, tuple[str, float]] = {}  # by process: its last heartbeat, and when it arrived
    for count in itertools.count():
        try:
            client.key_value_set(f"{_HEARTBEAT}{jax.process_index()}", str(count), allow_overwrite=True)
            latest = client.key_value_dir_get(_HEARTBEAT) if jax.process_index() == 0 else []
        except jax.errors.JaxRuntimeError:
            return
        for key, number in latest:
            if seen.get(key, ("", 0.0))[0] != number:
                seen[key] = number, time.monotonic()
        silent = [key for key, (_, since) in seen.items() if time.monotonic() - since > timeout]
        if silent:
            who = silent[0].removeprefix(_HEARTBEAT)
            message = f"process {who}: no sign of life for {timeout:g} seconds; {_RESTART}"
            _publish(client, {"message": message, "code": LOST_PEER})
        if silent or finished.wait(timeout / 5):
            return


def _publish(client, outcome: dict) -> None:
    """Publishes the outcome of the run; only the first one counts."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(_OUTCOME, json.dumps(outcome))


def _exit(client, code: int) -> None:
    """Exits together with the other processes, or after _EXIT_BARRIER_MS, without waiting for threads or devices."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier("llada_jax/exit", _EXIT_BARRIER_MS)
    if jax.process_index() == 0:
        time.sleep(1.0)  # the coordination service ends with this process, and processes that lose it abort
    os._exit(code)
