"""Rewards from worker processes: order, faults, time limits, and that no process is left."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.reinforcement import rewards
from llada_jax.reinforcement.questions import open_questions
from llada_jax.reinforcement.rewards import RewardPool
from tests.helpers.data_helpers import write_rows
from tests.helpers.paths import ROOT
from tests.helpers.waiting import is_running, wait_until

# An answer is a number or the name of what goes wrong; a row's "worth" is added to it.
REWARD = """
import os, re, sys, time

def reward(question, answer):
    if hasattr(sys.modules[__name__], answer):
        return getattr(sys.modules[__name__], answer)(question)
    return question["worth"] + float(answer)

def slow(question):
    time.sleep(0.15)
    return 0.5

def raises(question):
    raise KeyError("no " + 3000 * "such key ")

def leaves(question):
    sys.exit(0)

def exits(question):
    os._exit(7)

def killed(question):
    os.kill(os.getpid(), 9)

def hangs(question):
    time.sleep(600)

def searches(question):
    open(question["file"] + ".searches", "w").close()
    re.search("(a+)+b", "a" * 60)

def forks(question):
    return 0.25 if os.fork() else 1 / 0

def starts(question):
    import subprocess
    open(question["file"], "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)

def shuts(question):
    os.closerange(3, 200)
    time.sleep(600)

def prints(question):
    print("x" * 5_000_000)
    print("x" * 5_000_000, file=sys.stderr)
    os.write(1, b"x" * 1_000_000)
    return 0.75

def reads(question):
    return len(sys.stdin.read())

def text(question):
    return "1.0"

def long_text(question):
    return "x" * 50_000_000

def imports(question):
    return float("jax" in sys.modules or "numpy" in sys.modules)

nan = lambda question: float("nan")
inf = lambda question: float("-inf")
huge = lambda question: 10**400
none = lambda question: None
true = lambda question: True
pid = lambda question: os.getpid()
numpy_number = lambda question: __import__("numpy").float32(0.5)
numpy_array = lambda question: __import__("numpy").zeros(2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards_of_tests.py").write_text(REWARD)
    write_rows(
        folder / "q.jsonl",
        [{"prompt": f"What is {i}?", "answer": i, "worth": 10 * i, "file": str(folder / "pid")} for i in range(5)],
    )
    return folder


@pytest.fixture(scope="module")
def questions(folder):
    return open_questions(str(folder / "q.jsonl"))


@pytest.fixture
def by_file(folder):
    return f"{folder}/rewards_of_tests.py:reward"


@pytest.fixture(scope="module")
def pool(folder, questions):
    """One for all tests that kill no more than workers. Its limit is far more than the other answers take."""
    with RewardPool(questions, f"{folder}/rewards_of_tests.py:reward", seconds=5.0, default=-1.0) as pool:
        yield pool


def worth(questions, number):
    return questions.question(number).record["worth"]


def test_rewards_are_in_the_order_of_the_pairs_whichever_worker_is_first(pool, questions):
    pairs = [(i, "slow" if i % 7 == 0 else str(i / 8)) for i in range(40)]
    found = pool.score(pairs)
    expected = [0.5 if said == "slow" else worth(questions, i) + i / 8 for i, said in pairs]
    np.testing.assert_array_equal(found.rewards, expected)
    assert found.rewards.dtype == np.float64 and found.faults == []
    assert pool.score([]).rewards.shape == (0,)


FAULTS = {
    "raises": r"raised KeyError: 'no such key such key .*\(rewards_of_tests.py:14\)",
    "leaves": "raised SystemExit: 0",
    "exits": "ended its process with exit code 7",
    "killed": "ended its process by SIGKILL, perhaps for lack of memory",
    "hangs": r"took more than 5 s",
    "searches": r"took more than 5 s",
    "shuts": "closed its channel",
    "nan": "gave nan, expected a finite number",
    "inf": "gave -inf, expected a finite number",
    "huge": "gave inf, expected a finite number",
    "none": "gave NoneType, expected a number",
    "text": "gave str, expected a number",
    "long_text": "gave str, expected a number",
    "numpy_array": "gave ndarray, expected a number",
    "no number": "raised ValueError: could not convert string to float: 'no number'",
}


def test_every_fault_is_counted_with_its_question_and_the_other_rewards_are_right(pool, questions):
    pairs = [pair for i, kind in enumerate(FAULTS) for pair in ((i, kind), (i, "0.25"))]
    found = pool.score(pairs)
    np.testing.assert_array_equal(found.rewards[::2], -1.0)
    np.testing.assert_array_equal(found.rewards[1::2], [worth(questions, i) + 0.25 for i in range(len(FAULTS))])
    assert [fault.answer for fault in found.faults] == list(FAULTS)
    for i, (fault, what) in enumerate(zip(found.faults, FAULTS.values(), strict=True)):
        assert fault.number == i and fault.question == questions.question(i).text
        assert re.search(what, fault.what), fault
        assert len(str(fault)) < 500 and f"question {i} (What is " in str(fault) and "\n" not in str(fault)


def test_what_is_a_number_counts(pool):
    kinds = {"true": 1.0, "numpy_number": 0.5, "prints": 0.75, "reads": 0.0, "forks": 0.25}
    found = pool.score([(0, kind) for kind in kinds] * 2)
    assert found.rewards.tolist() == [*kinds.values()] * 2 and not found.faults


def test_a_worker_imports_neither_jax_nor_numpy_for_a_reward_that_does_not(questions, by_file):
    with RewardPool(questions, by_file, workers=1) as pool:
        assert pool.score([(0, "imports")]).rewards.tolist() == [0.0]


def test_an_answer_that_hangs_costs_its_limit_and_not_that_of_all(pool):
    begin = time.monotonic()
    found = pool.score([(0, "hangs"), *((i, "1") for i in range(200))])
    assert len(found.faults) == 1 and 5 <= time.monotonic() - begin < 100  # not 1000, on a machine that is busy


def test_long_questions_and_answers_pass(pool):
    found = pool.score([(0, "0" * 3_000_000 + "1"), (0, "\ud800"), (0, "1")])
    assert len(found.faults) == 1 and found.faults[0].answer == "\ud800" and (found.rewards[[0, 2]] >= 1).all()


def test_no_process_is_left(questions, by_file, folder):
    with RewardPool(questions, by_file, seconds=5.0, workers=2) as pool:
        pids = pool.score([(0, "pid"), (0, "slow")] * 2).rewards.astype(int).tolist()
        assert all(is_running(pid) for pid in pids if pid)
        pool.score([(0, "starts")])  # a process of the reward's own
        wait_until(lambda: not is_running(int((folder / "pid").read_text())))  # killed, but nobody's to wait for
    assert not any(is_running(pid) for pid in pids if pid)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([(0, "1")])
    pool.close()


def test_an_interrupt_ends_the_workers(questions, by_file, monkeypatch):
    pool = RewardPool(questions, by_file, workers=1)
    (pid,) = pool.score([(0, "pid")]).rewards.astype(int).tolist()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_events", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.score([(0, "hangs")])
    assert not is_running(pid)


@pytest.mark.parametrize("answer", ["searches", "0"])
def test_workers_end_when_their_parent_is_killed(by_file, tmp_path, answer):
    """Even when one is in the middle of a regular expression, which lets no other thread run."""
    began = tmp_path / "began"
    program = f"""
import time
from llada_jax.evaluation.questions import Question
from llada_jax.reinforcement.rewards import RewardPool
class Source:
    scoring = {{}}
    def question(self, number):
        return Question(None, "a", None, record={{"worth": 0, "file": {str(began)!r}}})
pool = RewardPool(Source(), {by_file!r}, 600, workers=1)
print(int(pool.score([(0, "pid")]).rewards[0]), flush=True)
pool.score([(0, {answer!r})])
open({f"{began}.{answer}"!r}, "w").close()
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    worker = int(parent.stdout.readline())
    wait_until(Path(f"{began}.{answer}").exists)
    assert is_running(worker)
    parent.kill()
    parent.communicate()
    try:
        wait_until(lambda: not is_running(worker))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_what_workers_and_their_pool_import_holds_no_jax():
    modules = "llada_jax.reinforcement.reward_worker, llada_jax.reinforcement.rewards, llada_jax.evaluation.questions"
    program = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_user_code_by_module(folder, questions, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    with RewardPool(questions, "rewards_of_tests:reward", workers=1) as pool:
        assert pool.score([(1, "0.5")]).rewards == worth(questions, 1) + 0.5


@pytest.mark.parametrize(
    "reward, message",
    [
        ("no_such.module:reward", "reward='no_such.module:reward': no module 'no_such'"),
        ("llada_jax.no_such:reward", "no module 'llada_jax.no_such'"),
        ("llada_jax.errors:no_such", "llada_jax.errors has no function 'no_such'"),
        ("llada_jax.errors:__name__", "has no function '__name__'"),
        ("FOLDER/none.py:reward", "none.py: no such file"),
        ("FOLDER/rewards_of_tests.py:no_such", "rewards_of_tests.py has no function 'no_such'"),
        ("FOLDER/bad.py:reward", r"SyntaxError: .*bad.py, line 1\)"),
        ("FOLDER/raises.py:reward", r"ZeroDivisionError: division by zero \(raises.py:2\)"),
        ("FOLDER/needs.py:reward", r"ModuleNotFoundError: No module named 'no_such' \(needs.py:1\)"),
        ("FOLDER/exits.py:reward", "3 workers did not start: the last ended its process with exit code 3"),
        ("llada_jax.errors", "expected task, code, MODULE:FUNCTION or FILE.py:FUNCTION"),
        (":reward", "expected task, code"),
        ("llada_jax.errors:", "expected task, code"),
        (None, "reward=None, expected task, code"),
        ("code", 'reward="code" needs questions with "tests"'),
    ],
)
def test_a_wrong_reward_is_one_line_when_the_pool_opens(folder, questions, reward, message):
    texts = {"bad": "def", "raises": "\n1 / 0", "needs": "import no_such", "exits": "import os\nos._exit(3)"}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    reward = reward and reward.replace("FOLDER", str(folder))
    with pytest.raises(InputError, match=message) as error:
        RewardPool(questions, reward, workers=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [("seconds", 0), ("seconds", float("nan")), ("default", None), ("workers", 0)])
def test_bad_values_are_named(questions, name, value):
    with pytest.raises(InputError, match=f"reward {name}="):
        RewardPool(questions, **{name: value})


def test_a_reward_that_vanishes_ends_the_run_in_one_line(questions, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import os\ndef reward(question, answer):\n    os._exit(1)\n")
    pool = RewardPool(questions, f"{file}:reward", workers=1)
    file.unlink()
    with pytest.raises(InputError, match="own.py: no such file"):
        pool.score([(0, "1")] * 3)


def test_the_tasks_own_score(questions):
    with RewardPool(questions, workers=2) as pool:
        answers = [str(questions.question(i).record["answer"]) for i in range(5)]
        pairs = [(i, said) for i in range(5) for said in answers]
        expected = [questions.question(i).score(said) for i, said in pairs]
        assert pool.score(pairs).rewards.tolist() == expected and sum(expected) == 5


def test_reasoning_gym_scores_as_in_this_process():
    made = open_questions("reasoning_gym:number_filtering", {"max_numbers": 4}, seed=3)
    with RewardPool(made, workers=1) as pool:
        right = [made.question(i).record["answer"] for i in range(6)]
        pairs = [(i, f" {right[j]}\n") for i in range(6) for j in range(6)]
        expected = [made.question(i).score(said) for i, said in pairs]
        assert pool.score(pairs).rewards.tolist() == expected and sum(expected) >= 6


def test_programs_are_run_against_the_tests_of_their_row(tmp_path, monkeypatch):
    tests = "assert add(1, 2) == 3"
    row = {"prompt": "Write add(a, b).", "tests": tests}
    rows = open_questions(write_rows(tmp_path / "q.jsonl", [row, row | {"function": "add"}]), tests=True)
    right = "def add(a, b):\n    return a + b"
    answers = {
        right: 1, f"Here:\n```python\n{right}\n```\nIt adds.": 1, f"```\n1/0\n```\nno:\n```\n{right}": 1,
        right.replace("+", "-"): 0, f"```\n{right}\n```\nor\n```\nraise SystemExit(0)\n```": 0, "": 0,
    }  # fmt: skip
    with RewardPool(rows, "code", workers=2) as pool:
        found = pool.score([*((0, answer) for answer in answers), *((1, answer) for answer in list(answers)[:5])])
    assert found.rewards.tolist() == [*answers.values()] + list(answers.values())[:5] and not found.faults
    assert [rows.question(0).score(said) for said in list(answers)[:5]] == list(answers.values())[:5]
    monkeypatch.setattr(rewards, "_GRACE_SECONDS", 100.0)  # it is the programs that are late, whatever else is
    with RewardPool(rows, "code", seconds=0.5, default=-1.0, workers=2) as pool:
        found = pool.score([(0, "import time; time.sleep(600)"), (0, "while 1: pass")])
    assert found.rewards.tolist() == [0, 0] and not found.faults
