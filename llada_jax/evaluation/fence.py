"""Runs the Python program on stdin with limits: python -I fence.py SECONDS MEMORY_BYTES FILE_BYTES.

A script of its own, that imports nothing of the package: the limits hold from its first line on. Exit code 97: this
system has no such fence, and the program was not run.
"""

import ctypes
import platform
import resource
import struct
import sys

_UNFENCED = 97
# (audit architecture, numbers of the system calls socket and io_uring_setup) of seccomp(2)
_CALLS = {"x86_64": (0xC000003E, (41, 425)), "aarch64": (0xC00000B7, (198, 425))}
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


def limit(seconds: int, memory_bytes: int, file_bytes: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def cut_network() -> None:
    """Lets this process, and what it starts, make no socket ever again. Raises OSError or KeyError if it cannot be."""
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


if __name__ == "__main__":
    text = sys.stdin.read()
    try:
        limit(*map(int, sys.argv[1:]))
        cut_network()
    except (OSError, KeyError, AttributeError, ValueError):
        sys.exit(_UNFENCED)
    sys.argv = ["program"]
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})
