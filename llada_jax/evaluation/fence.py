"""A restricted process: limits of time, memory and file size, and no sockets.

    python -I fence.py run SECONDS MEMORY_BYTES FILE_BYTES < PROGRAM
    python -I fence.py judge SECONDS MEMORY_BYTES FILE_BYTES < JSON of {"program", "function", "tests"}

run exits as the program does. judge exits with code 0 if check(FUNCTION) of the tests returns, else with another code.
The tests run in this process, and the program in a fork made before they are read. Only the arguments of each call, its
result, and an exception's name and text cross between the two, all as plain data. So a program cannot claim that it has
passed; it can only answer calls.

This script imports nothing of the package, so that the limits hold from its first line on. Exit code 97: this system
does not support the restrictions, and nothing was run.
"""

import builtins
import ctypes
import json
import os
import pickle
import platform
import resource
import signal
import struct
import sys

_UNFENCED = 97
# (audit architecture, numbers of the system calls socket, io_uring_setup, ptrace, process_vm_readv and _writev)
_CALLS = {"x86_64": (0xC000003E, (41, 425, 101, 310, 311)), "aarch64": (0xC00000B7, (198, 425, 117, 270, 271))}
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER, _SET_DUMPABLE, _SET_DEATH_SIGNAL = 38, 22, 2, 4, 1
# Classes, beyond plain data, that a result may have.
_CLASSES = {("fractions", "Fraction"), ("decimal", "Decimal")} | {
    ("builtins", name) for name in ("complex", "range", "bytearray")
}


def limit(seconds: int, memory_bytes: int, file_bytes: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def end_with_parent() -> None:
    """Ends this process when the one that started it ends in any way."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def cut_off() -> None:
    """Forbids this process and its children to create sockets or trace processes. Raises OSError or KeyError if the
    system does not support that.
    """
    architecture, calls = _CALLS[platform.machine()]
    refused = [(_EQUAL, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0), (_AT_LEAST, len(calls) + 1, 0, 0x40000000), *refused,  # above: x86's other call numbers
        (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    program = Program(len(steps), ctypes.addressof(code))
    control = ctypes.CDLL(None, use_errno=True).prctl
    if control(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or control(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def judge() -> None:
    """Exits with 0 when the tests on stdin have passed, with 1 as soon as they cannot pass."""
    asked, answered = os.pipe(), os.pipe()
    if not os.fork():
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the tests are not for the program
        for end in (asked[1], answered[0]):
            os.close(end)
        return answer(open(asked[0], "rb"), open(answered[1], "wb"))
    ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # its memory and its files in /proc are closed to the program
    for end in (asked[0], answered[1]):
        os.close(end)
    task = json.load(sys.stdin)
    call = caller(open(asked[1], "wb"), open(answered[0], "rb"))
    call(task["program"], task["function"])
    names = {"__name__": "tests"}
    exec(compile(task["tests"], "tests", "exec"), names)
    names[task["function"]] = call  # some tests know it by its name
    names["check"](call)
    os._exit(0)


def caller(requests, results):
    """A function that forwards calls to the program's process and returns, or raises, the result."""

    def call(*args, **kwargs):
        try:
            pickle.dump((args, kwargs), requests)
            requests.flush()
            how, value = _Plain(results).load()
        except Exception:  # it has ended, or sent something else than plain data; no test may catch that
            os._exit(1)
        if how == "value":
            return value
        if how == "iterator":
            return iter(value)
        kind = getattr(builtins, str(how), Exception)
        raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception)(value)

    return call


def answer(requests, results) -> None:
    """Runs the program of the first request, then its function on the arguments of each later one."""
    function = None
    while True:
        args, kwargs = pickle.load(requests)
        try:
            if function is None:
                program, name = args
                names = {"__name__": "__main__"}
                exec(compile(program, "program", "exec"), names)
                function, value = names[name], None
            else:
                value = function(*args, **kwargs)
            iterator = hasattr(value, "__next__")
            reply = pickle.dumps(("iterator", [*map(plain, value)]) if iterator else ("value", plain(value)))
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            reply = pickle.dumps((kinds[0], str(error)))
        results.write(reply)
        results.flush()


def plain(value):
    """The value as plain data; a subclass becomes its base. Other values are returned unchanged and refused later."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    for kind in (str, bytes, bytearray, int, float):
        if isinstance(value, kind):
            return kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


class _Plain(pickle.Unpickler):
    """Reads plain data and runs no code from the sender."""

    def find_class(self, module, name):
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


if __name__ == "__main__":
    try:
        limit(*map(int, sys.argv[2:]))
        end_with_parent()
        cut_off()
    except (OSError, KeyError, AttributeError, ValueError):
        sys.exit(_UNFENCED)
    command, sys.argv = sys.argv[1], ["program"]
    if command == "judge":
        judge()
    else:
        exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
