"""Several hosts: how the processes of a run connect, work in turn, and check that they belong to the same run.

Every process runs the same program on its own devices. Process 0 runs JAX's coordination service, which connects them.
"""

import contextlib
import hashlib
import itertools
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llada_jax.errors import InputError

T = TypeVar("T")

LOST_PEER = 75  # exit code, EX_TEMPFAIL: when all processes are started again, the run can resume

WEEK_MS = 7 * 24 * 3600 * 1000  # longest wait for each other; the coordination service ends it when a process dies
_VISIBLE_SECONDS = 30.0  # until a new file shows on the other hosts of a network file system
_LATER = 10  # seconds that JAX waits longer than we do, since it would abort with a stack trace
_turns = itertools.count()


def connect(
    coordinator: str | None, processes: int | None, process: int | None, peer_timeout: int, start_timeout: int
) -> None:
    """Connects the processes of a run. Must be called before JAX has initialized a device.

    coordinator: "HOST:PORT" on which process 0 listens; process: this process's index, of `processes`. If all three
    are None, a TPU VM's environment (Cloud TPU, GKE, several slices) provides them; elsewhere the run has one process.
    peer_timeout: seconds of silence after which a process counts as dead; start_timeout: seconds to wait for all.
    Raises InputError on bad values; exits with LOST_PEER if the others do not arrive in time.
    """
    flagged = _check_flags(coordinator, processes, process, peer_timeout, start_timeout)
    if not flagged and not _on_tpu_vm():
        return
    who = f"process {process} of {processes}" if flagged else "this host"
    text = f"{who}: the others were not all at {coordinator or 'the coordinator'} within {start_timeout} seconds"
    alarm = threading.Timer(start_timeout, _give_up, args=(text,))
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process,
            initialization_timeout=start_timeout + _LATER, heartbeat_timeout_seconds=2 * peer_timeout + _LATER,
        )  # fmt: skip
    except ValueError:  # a TPU machine that is part of no cluster
        if flagged:
            raise
    except RuntimeError as error:
        raise InputError(f"--coordinator={coordinator}: {_first_line(error)}") from error
    finally:
        alarm.cancel()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"this host is one of {jax.process_count()}, and its environment does not say how to reach the others: "
            "set --coordinator, --processes and --process"
        )


def _give_up(text: str) -> None:
    print(f"error: {text} (--start_timeout)", file=sys.stderr, flush=True)
    os._exit(LOST_PEER)


def _check_flags(coordinator, processes, process, peer_timeout: int, start_timeout: int) -> bool:
    """Whether the flags identify the processes. Raises InputError naming a flag that is wrong or missing."""
    for flag, seconds in (("--peer_timeout", peer_timeout), ("--start_timeout", start_timeout)):
        if seconds < 1:
            raise InputError(f"{flag}={seconds}, expected at least one second")
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return False
    if missing:
        raise InputError(f"{' and '.join(missing)} missing: --coordinator, --processes and --process go together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator={coordinator}, expected HOST:PORT")
    if not 0 <= process < processes:
        raise InputError(f"--process={process}, expected 0 to {processes - 1}: --processes={processes}")
    return True


def _on_tpu_vm() -> bool:
    from jax._src import cloud_tpu_init  # what jax.distributed.initialize checks; it has no public name

    return cloud_tpu_init.running_in_cloud_tpu_vm and (jax.config.jax_platforms or "tpu").split(",")[0] == "tpu"


def coordination_client():
    """The client of the coordination service; None in a run of one process."""
    from jax._src import distributed  # its key-value store and barriers have no public name

    return distributed.global_state.client if jax.distributed.is_initialized() and jax.process_count() > 1 else None


# ---- turns


def in_turn(work: Callable[[], T]) -> T:
    """Runs work() on process 0, then on the others, which see what process 0 wrote. Returns when all are done."""
    if jax.process_index() == 0:
        done = work()
        barrier()
    else:
        barrier()
        done = work()
    barrier()
    return done


def barrier() -> None:
    """Waits for all processes, for days if necessary."""
    if (client := coordination_client()) is not None:
        client.wait_at_barrier(f"llada_jax/turn-{next(_turns)}", WEEK_MS)


@contextlib.contextmanager
def console():
    """Inside, only process 0 writes to standard output; every process writes its errors to standard error."""
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def check_same(what: str, value: str) -> None:
    """Raises InputError on all processes if their values differ."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    everywhere = multihost_utils.process_allgather(mine)
    for process, theirs in enumerate(everywhere):
        if not np.array_equal(theirs, everywhere[0]):
            raise InputError(f"process {process} has another {what} than process 0")


def check_shared(directory: epath.Path) -> None:
    """Raises InputError on all processes if one of them does not see files that process 0 writes to `directory`."""
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    note = directory / f".seen-{int(token):08x}"
    if jax.process_index() == 0:
        note.touch()
    barrier()
    until = time.monotonic() + _VISIBLE_SECONDS
    while not (seen := note.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    everywhere = multihost_utils.process_allgather(np.array(seen))
    if jax.process_index() == 0:
        note.unlink()
    if not everywhere.all():
        raise InputError(
            f"--workdir={directory}: process {int(np.argmin(everywhere))} does not see what process 0 writes there; "
            "all hosts need one shared folder"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
