"""Runs Python programs, alone or against tests, in the restricted process of fence.py. What that protects against, and
what it does not: code.py.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile

from llada_jax.errors import InputError
from llada_jax.evaluation import fence

SECONDS = 10
_MEMORY_BYTES = 2 << 30
_FILE_BYTES = 1 << 20


def check_fence() -> None:
    """Raises InputError if this system does not support the restrictions."""
    if not run_program("pass"):
        raise InputError("code execution: no seccomp filter can be set here (on Linux on x86_64 or aarch64 it can)")


def run_program(program: str, seconds: int = SECONDS, memory_bytes: int = _MEMORY_BYTES) -> bool:
    """Whether a Python program exits with code 0 within its limits. It is not run if the system has no such fence.

    Not a test of a program, which can choose its exit code.
    """
    return ends_well("run", program, seconds, memory_bytes)


def run_tests(program: str, tests: str, function: str | None = None, seconds: int = SECONDS) -> bool:
    """Whether the tests, a Python program that raises when something is wrong, reach their end.

    function: the name of a function of `program`. The tests run in another process and know it by that name; only its
    arguments and results, plain data, cross. Without it, the tests follow the program in one process: one that ends
    early does not pass, but one that sets out to deceive the tests can.
    """
    if function is not None:
        check = f"def check(candidate):\n    exec({tests!r}, {{'__name__': 'tests', {function!r}: candidate}})\n"
        task = {"program": program, "function": function, "tests": check}
        return ends_well("judge", json.dumps(task), seconds)
    code = random.SystemRandom().randrange(100, 250)  # which a program that ends early does not know
    return ends_well("run", f"{program}\n\n{tests}\n\nimport os\nos._exit({code})\n", seconds, code=code)


def ends_well(command: str, text: str, seconds: int, memory_bytes: int = _MEMORY_BYTES, code: int = 0) -> bool:
    """Whether a command of fence.py, with the text on stdin, exits with `code`.

    seconds: of processor time; it has twice as long in all.
    """
    limits = map(str, (seconds, memory_bytes, _FILE_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        running = subprocess.Popen(
            [sys.executable, "-I", fence.__file__, command, *limits], cwd=folder, env={}, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            running.communicate(text.encode(), timeout=2 * seconds)  # it may sleep, which takes no processor time
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # what it started, too
            running.wait()
    return running.returncode == code
