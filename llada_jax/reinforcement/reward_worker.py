"""A process that scores answers by one reward, for rewards.RewardPool.

It imports no JAX unless the reward does: it starts fast, and no accelerator is taken from the trainer. On its channel
it is told (reward, scoring), says ("ready",) or ("unusable", why), and answers every (record, answer) by ("scored",
number or None, what went wrong). It ends when the pool's process closes the channel, or ends in any way.
"""

import fcntl
import importlib
import importlib.util
import math
import numbers
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from llada_jax.errors import InputError

_MOST_SAID = 300  # characters of an error


def main(descriptor: int) -> None:
    """descriptor: of this process's end of the channel. Its stdin is a pipe of which the pool has the other end."""
    _end_with_parent()
    channel = Connection(descriptor)
    try:
        try:
            reward = load(*channel.recv())
        except BaseException as error:  # the code is the user's, and may raise anything
            return channel.send(("unusable", str(error) if isinstance(error, InputError) else _one_line(error)))
        channel.send(("ready",))
        process = os.getpid()
        while True:
            found = scored(reward, *channel.recv())
            if os.getpid() != process:
                os._exit(1)  # a fork that the reward made, and did not end
            channel.send(("scored", *found))
    except (EOFError, ConnectionError):
        return  # the pool has ended


def load(reward: str, scoring: dict) -> Callable[[dict, str], float]:
    """The function that a reward names. scoring: as in evaluation.questions.scorer, for the task's own.

    Raises InputError if there is no such module, file or function, and whatever the user's code raises.
    """
    if ":" not in reward:
        from llada_jax.evaluation.questions import scorer

        return scorer(scoring)
    place, _, name = reward.rpartition(":")
    function = getattr(_file(place) if place.endswith(".py") else _module(place), name, None)
    if not callable(function):
        raise InputError(f"{place} has no function {name!r}")
    return function


def _file(path: str):
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):  # not one that the module itself imports
            raise InputError(f"no module {error.name!r}") from error
        raise


def scored(reward: Callable, record: dict, answer: str) -> tuple[float | None, str]:
    """(the finite number that the reward gives, "") or (None, what it did instead)."""
    try:
        value = reward(record, answer)
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if not isinstance(value, numbers.Real):
            return None, f"gave {type(value).__name__}, expected a number"
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        return (value, "") if math.isfinite(value) else (None, f"gave {value}, expected a finite number")
    except BaseException as error:  # SystemExit too: the reward's end is not the worker's
        return None, f"raised {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    """The error and the line of the user's code, or of what it calls, that raised it."""
    text = " ".join(f"{type(error).__name__}: {str(error)[:_MOST_SAID]}".split())[:_MOST_SAID]
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    of_user = [place for place in frames if place[0] not in (__file__, importlib.__file__) and place[0][:1] != "<"]
    return text + (f" ({os.path.basename(of_user[-1][0])}:{of_user[-1][1]})" if of_user else "")


def _end_with_parent() -> None:
    """The kernel ends this process when the other end of stdin is closed, whatever this process is doing then.

    A thread that waits for that could not: a regular expression that takes for ever keeps all threads waiting. Nor does
    the signal at the parent's death serve, which is sent when the thread that started this process ends.
    """
    watched = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    fcntl.fcntl(watched, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(watched, fcntl.F_SETFL, os.O_ASYNC)  # SIGIO, which ends a process that has no handler for it
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    if _is_closed(watched):  # before this process asked for the signal
        sys.exit()


def _is_closed(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLHUP)
    return bool(poll.poll(0))
