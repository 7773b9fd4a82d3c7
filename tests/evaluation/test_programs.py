"""Programs that a model writes: what they may not do, and the tests that they pass."""

import subprocess
import sys
import time

import pytest

from llada_jax.errors import InputError
from llada_jax.evaluation import fence, programs
from tests.helpers.waiting import is_running, wait_until


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
        "import os, sys\nif os.fork(): sys.exit(os.wait()[1] != 0)\nimport socket; socket.socket()",
        "x = bytearray(1 << 31)",
        "open('big', 'wb').write(bytes(2 << 20))",
        "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",  # PTRACE_TRACEME
    ],
)  # fmt: skip
def test_what_a_program_may_not_do(program):
    assert not programs.run_program(program, memory_bytes=1 << 30)


def test_the_fence_lets_through_what_is_harmless():
    assert programs.run_program(
        "import json, math, re, collections\nopen('small', 'w').write('x')\nassert __name__ == '__main__'"
    )
    assert programs.run_program("import os\nassert not os.listdir('.') and 'HOME' not in os.environ")


def test_time_is_limited_asleep_or_busy_and_children_end_with_it():
    begin = time.monotonic()
    assert not programs.run_program("while True: pass", seconds=1)
    assert not programs.run_program("import time; time.sleep(600)", seconds=1)
    assert not programs.run_program("import os, time\nif os.fork(): os.wait()\nelse: time.sleep(600)", seconds=1)
    assert time.monotonic() - begin < 200


SUM = "def add(a, b):\n    return a + b\n"
TESTS = 'assert add(1, 2) == 3\nassert add(a := 4, 1) == 5, """a\n    text of two lines"""\n'


@pytest.mark.parametrize("function", [None, "add"])
def test_a_program_passes_tests_only_by_reaching_their_end(function):
    assert programs.run_tests(SUM, TESTS, function)
    for program in (
        SUM.replace("+", "-"), "", "def add(", "raise SystemExit(0)", "import os; os._exit(0)",
        SUM + "import atexit, os\natexit.register(os._exit, 0)\nadd = None", "import sys; add = lambda *_: sys.exit()",
    ):  # fmt: skip
        assert not programs.run_tests(program, TESTS, function), program


def test_tests_in_a_process_of_their_own_are_not_deceived_by_what_an_answer_does_to_python():
    class_of_all = "class Any(int):\n    __eq__ = lambda *_: True\ndef add(a, b):\n    return Any(7)\n"
    assert programs.run_tests(class_of_all, TESTS) and not programs.run_tests(class_of_all, TESTS, "add")


def test_a_system_without_the_fence_is_named(monkeypatch):
    programs.check_fence()
    monkeypatch.setattr(fence, "__file__", "/dev/null/fence.py")
    with pytest.raises(InputError, match="no seccomp filter"):
        programs.check_fence()


def test_a_program_ends_with_the_process_that_started_it(tmp_path):
    """Even when that one is killed."""
    begun = tmp_path / "begun"
    asleep = f"import os, time\nopen({str(begun)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    starts = f"from llada_jax.evaluation import programs\nprograms.run_program({asleep!r}, seconds=1000)"
    process = subprocess.Popen([sys.executable, "-c", starts])
    wait_until(lambda: begun.exists() and begun.read_text())
    process.kill()
    process.wait()
    wait_until(lambda: not is_running(int(begun.read_text())))
