"""Programs that a model writes: what they may not do, and how completions are scored."""

import time

import pytest

from llada_jax.evaluation import code

PROBLEM = {
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


def test_a_right_program_passes_and_wrong_ones_fail():
    assert code.passes(PROBLEM, "    return a + b\n")
    for answer in ("    return a - b\n", "    return\n", "    syntax error", "    raise SystemExit(3)", ""):
        assert not code.passes(PROBLEM, answer)


def test_what_follows_the_function_does_not_count():
    assert code.passes(PROBLEM, "    return a + b\n\ndef add(a, b):\n    return 0\n")
    assert code.complete("    x\n    # y\n\nprint(1)") == "    x\n    # y\n"


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
        "import os, sys\nif os.fork(): sys.exit(os.wait()[1] != 0)\nimport socket; socket.socket()",
        "x = bytearray(1 << 31)",
        "open('big', 'wb').write(bytes(2 << 20))",
    ],
)  # fmt: skip
def test_what_a_program_may_not_do(program):
    assert not code.run_program(program, memory_bytes=1 << 30)


def test_the_fence_lets_through_what_is_harmless():
    assert code.run_program(
        "import json, math, re, collections\nopen('small', 'w').write('x')\nassert __name__ == '__main__'"
    )
    assert code.run_program("import os\nassert not os.listdir('.') and 'HOME' not in os.environ")


def test_time_is_limited_asleep_or_busy_and_children_end_with_it():
    begin = time.monotonic()
    assert not code.run_program("while True: pass", seconds=1)
    assert not code.run_program("import time; time.sleep(60)", seconds=1)
    assert not code.run_program("import os, time\nif os.fork(): os.wait()\nelse: time.sleep(60)", seconds=1)
    assert time.monotonic() - begin < 15


def test_the_problems_and_their_own_solutions():
    problems = list(code.read_problems())
    assert len(problems) == 164
    for problem in problems[::40]:
        assert code.passes(problem, problem["canonical_solution"]) and not code.passes(problem, "    pass\n")
    questions = code.humaneval_questions(3)
    assert [question.text for question in questions] == [problem["prompt"] for problem in problems[:3]]
    assert questions[1].score(problems[1]["canonical_solution"]) == 1 and questions[1].score("") == 0
