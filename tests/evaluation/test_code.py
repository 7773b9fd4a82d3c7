"""Completions that a model writes: how they are scored."""

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


# Answers that pass where tests and answer share a process, or where a process's end is what counts.
SHORTCUTS = {
    "exit": "    raise SystemExit(0)\n",
    "sys.exit": "    import sys; sys.exit()\n",
    "os._exit": "    import os; os._exit(0)\n",
    "at once": "    return 0\nraise SystemExit(0)\n",
    "at the end": "    return 0\nimport_ = __import__('atexit').register(lambda: __import__('os')._exit(0))\n",
    "a process of its own": "    import os\n    os.execv('/bin/true', ['true'])\n",
    "its parent's end": "    import os, signal\n    os.kill(os.getppid(), signal.SIGTERM)\n    os._exit(0)\n",
    "equal to all": "    return type('Any', (int,), {'__eq__': lambda *_: True, '__hash__': int.__hash__})(7)\n",
    "equal, of its own": "    class Any:\n        __eq__ = lambda *_: True\n    return Any()\n",
    "pickled code": "    class Any:\n        __reduce__ = lambda self: (eval, ('3',))\n    return Any()\n",
    "other errors": "    import builtins\n    builtins.AssertionError = builtins.Exception = OSError\n    return 0\n",
    "other tests": "    import sys\n    for f in sys._current_frames().values():\n"
    "        while f:\n            f.f_globals['check'] = f.f_builtins['check'] = print\n            f = f.f_back\n"
    "    return 0\n",
    "results of its own": "    import os, pickle\n    for fd in range(3, 60):\n        try:\n"
    "            os.write(fd, pickle.dumps(('passed', 0)) * 9)\n        except OSError:\n            pass\n"
    "    os._exit(0)\n",
    "where tests come from": "    import os\n    for fd in range(60):\n        for of in ('self', os.getppid()):\n"
    "            try:\n                text = open(f'/proc/{of}/fd/{fd}', 'rb', buffering=0).read(1 << 16)\n"
    "            except OSError:\n                continue\n            if b'== 3' in text:\n                return 3\n"
    "            if fd > 2:\n                return 0\n",
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_an_answer_passes_by_its_results_only(name, monkeypatch):
    monkeypatch.setattr(code, "_SECONDS", 2)
    assert not code.passes(PROBLEM, SHORTCUTS[name])


def test_a_test_that_catches_everything_sees_only_errors_of_the_function():
    def passes(answer):
        test = (
            "def check(candidate):\n    try:\n        candidate(0, 0)\n    except ValueError as e:\n"
            "        assert str(e) == 'no'\n    except:\n        pass\n    else:\n        assert 0\n"
        )
        return code.passes(PROBLEM | {"test": test}, answer)

    assert passes("    raise ValueError('no')\n") and passes("    return undefined\n")
    assert passes("    class Mine(ValueError): pass\n    raise Mine('no')\n")
    assert not passes("    raise ValueError('other')\n") and not passes("    return 3\n")
    assert not passes("    raise SystemExit\n") and not passes("    import os; os._exit(0)\n")


@pytest.mark.parametrize(
    "expected, answer",
    [
        ("{'a': [1, 2]}", "collections.defaultdict(list, a=[1, 2])"),
        ("{'a': 2}", "collections.Counter('aa')"),
        ("(1, 2.5)", "collections.namedtuple('P', 'x y')(1, 2.5)"),
        ("0.5", "fractions.Fraction(1, 2)"),
        ("[None, True, 'é', b'x', {1}, 1j, 10**5000]", "[None, True, 'é', b'x', {1}, 1j, 10**5000]"),
        ("3", "enum.IntEnum('E', {'x': 3}).x"),
        ("[0, 1]", "[*map(int, '01')]"),
    ],
)
def test_results_that_equal_what_is_expected_pass(expected, answer):
    test = f"def check(candidate):\n    assert candidate() == {expected}\n"
    problem = {"prompt": "import collections, enum, fractions\ndef f():\n", "test": test, "entry_point": "f"}
    assert code.passes(problem, f"    return {answer}\n")


def test_an_iterator_is_no_list(monkeypatch):
    for form, right in (("candidate()", False), ("list(candidate())", True)):
        test = f"def check(candidate):\n    assert {form} == [0, 1]\n"
        problem = {"prompt": "def f():\n", "test": test, "entry_point": "f"}
        assert code.passes(problem, "    yield 0\n    yield 1\n") == right
        assert code.passes(problem, "    return map(int, '01')\n") == right
        assert not code.passes(problem, "    return [0, 2]\n")
    monkeypatch.setattr(code, "_SECONDS", 1)
    assert not code.passes(problem, "    while True: yield 0\n")


def test_the_tests_use_what_the_prompt_defines_and_a_program_may_print_and_read():
    prompt = "def one():\n    return 1\n\n\ndef two(x):\n"
    test = "def check(candidate):\n    assert candidate(1, x=one()) == two(1, x=1) == 2\n"
    problem = {"prompt": prompt.replace("two(x)", "two(y, x)"), "test": test, "entry_point": "two"}
    said = "    import sys\n    print(x); print(x, file=sys.stderr); sys.stdin.read()\n    return y + one()\n"
    assert code.passes(problem, said)


def test_what_follows_the_function_does_not_count():
    assert code.passes(PROBLEM, "    return a + b\n\ndef add(a, b):\n    return 0\n")
    assert code.complete("    x\n    # y\n\nprint(1)") == "    x\n    # y\n"


def test_the_problems_and_their_own_solutions():
    problems = list(code.read_problems())
    assert len(problems) == 164
    for problem in problems[::40]:
        assert code.passes(problem, problem["canonical_solution"]) and not code.passes(problem, "    pass\n")
    questions = code.humaneval_questions(3)
    assert [question.text for question in questions] == [problem["prompt"] for problem in problems[:3]]
    assert questions[1].score(problems[1]["canonical_solution"]) == 1 and questions[1].score("") == 0
