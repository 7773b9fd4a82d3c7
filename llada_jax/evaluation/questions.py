"""Questions whose answers can be checked: of reasoning-gym, and of JSONL files.

This imports no JAX: processes that only score answers start fast.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable

from llada_jax.data import chat, jsonl
from llada_jax.data.conversation import shapes
from llada_jax.errors import InputError
from llada_jax.evaluation import grading, programs
from llada_jax.tokenizer import Tokenizer

_CODE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)  # a block of code, the last of which may be cut off


@dataclasses.dataclass(frozen=True)
class Question:
    """messages: a conversation, or text: a bare prompt. score(answer): in [0, 1]. group: a set of questions whose mean
    score is also reported. more: other keys of the row, such as tools, as in data/chat.py. place: file and line, for
    error messages. record and scoring: plain data by which another process can score, see `scorer`.
    """

    messages: list[dict] | None
    text: str | None
    score: Callable[[str], float]
    group: str = ""
    more: dict = dataclasses.field(default_factory=dict)
    place: str = ""
    record: dict = dataclasses.field(default_factory=dict)
    scoring: dict = dataclasses.field(default_factory=dict)

    def asks(self) -> str:
        """What the last turn of the conversation, or the bare prompt, says: for messages to people."""
        return self.text if self.messages is None else str(self.messages[-1].get("content")) if self.messages else ""

    def prompt(self, tokenizer: Tokenizer) -> str:
        """The text of the prompt."""
        return self.asked(tokenizer).text

    def asked(self, tokenizer: Tokenizer) -> chat.Prompt:
        """What the model continues: the conversation in the tokenizer's chat template, or the bare prompt.

        Raises InputError if there is nothing to answer or the template leaves out part of it.
        """
        asked = {"prompt": self.text} if self.messages is None else {"messages": self.messages}
        try:
            return chat.prompt(self.more | asked, tokenizer)
        except InputError as error:
            raise InputError(f"{self.place}: {error}" if self.place else str(error)) from error

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the prompt."""
        return self.asked(tokenizer).ids(tokenizer)


def scorer(scoring: dict) -> Callable[[dict, str], float]:
    """score(record, answer) in [0, 1] for all questions of a source, which have the same `scoring`:

    {"reasoning_gym": name, "settings": dict}, {"extract": pattern or None}, or {"tests": seconds of processor time,
    "extract": pattern or None}. Raises InputError on what reasoning_gym_questions and file_questions refuse.
    """
    if "reasoning_gym" in scoring:
        return _full_marks(_dataset(scoring["reasoning_gym"], 1, 0, scoring["settings"]))
    extract = scoring["extract"]
    find = grading.compiled(extract, "extract") if extract else None
    if "tests" in scoring:
        return functools.partial(_passes_tests, find=find, seconds=scoring["tests"])
    return functools.partial(_is_right, find=find)


def reasoning_gym_questions(name: str, size: int, seed: int = 0, settings: dict | None = None) -> list[Question]:
    """`size` questions of a reasoning-gym task, a function of the seed, with the task's own scorer.

    An answer scores 1 if the scorer gives it full marks, else 0. Raises InputError on an unknown task or setting, or if
    reasoning-gym is not installed.
    """
    return list(map(reasoning_gym_source(name, size, seed, settings), range(size)))


def reasoning_gym_source(
    name: str, size: int, seed: int = 0, settings: dict | None = None
) -> Callable[[int], Question]:
    """make(index) for index < size, which makes one of reasoning_gym_questions when it is asked for.

    record: {"question": text, "answer": a right one, "entry": all that reasoning-gym says}. Raises InputError likewise.
    """
    data = _dataset(name, size, seed, settings)
    score, scoring = _full_marks(data), {"reasoning_gym": name, "settings": settings or {}}

    def make(index: int) -> Question:
        try:
            entry = data[index]
        except Exception as error:  # some settings are refused only here, by whatever they break
            raise InputError(f"reasoning_gym:{name}: question {index}: {type(error).__name__}: {error}") from error
        record = {"question": entry["question"], "answer": entry["answer"], "entry": entry}
        messages = [{"role": "user", "content": entry["question"]}]
        return Question(messages, None, functools.partial(score, record), record=record, scoring=scoring)

    return make


def _dataset(name: str, size: int, seed: int, settings: dict | None):
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise InputError("reasoning-gym is not installed: pip install -e '.[eval]'") from error
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **(settings or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"reasoning_gym:{name}: {error}") from error


def _full_marks(data) -> Callable[[dict, str], float]:
    return lambda record, answer: float(data.score_answer(answer.strip(), record["entry"]) >= 1)


def file_questions(
    path: str, limit: int | None = None, extract: str | None = None, run_tests: bool = False
) -> list[Question]:
    """Questions of a JSONL file: "prompt" (text) or "messages" (and "tools"), and "answer" or "pattern".

    "answer" (text or number): an answer is right if grading.same accepts it. "pattern": a regular expression that an
    answer must contain. extract: a regular expression; only its last match (grading.extracted) is scored, and an answer
    without a match is wrong. The record of a question is its row. Raises InputError naming file and line.

    run_tests: instead, each row has "tests" (text of a Python program) and perhaps "function" (a name); the code of an
    answer is run with them as in programs.run_tests. The code is what `extract` finds; without it, the last block
    between ``` and ```, or all of the answer if there is none.
    """
    if run_tests:
        programs.check_fence()
    scoring = {"extract": extract} | ({"tests": programs.SECONDS} if run_tests else {})
    score = scorer(scoring)
    questions = []
    for place, row in itertools.islice(jsonl.read_values(path), limit):
        _check_row(row, run_tests, place)
        more = {name: row[name] for name in (*shapes.CONTEXT, *shapes.MORE, *shapes.MEDIA) if row.get(name)}
        own = {"score": functools.partial(score, row), "record": row, "scoring": scoring}
        questions.append(Question(row.get("messages"), row.get("prompt"), more=more, place=place, **own))
    if not questions:
        raise InputError(f"{path}: no questions")
    return questions


def _check_row(row, run_tests: bool, place: str) -> None:
    known = isinstance(row, dict)
    if known and run_tests:
        known = isinstance(row.get("tests"), str) and isinstance(row.get("function"), str | None)
    elif known:
        known = _is_answer(row.get("answer")) != isinstance(row.get("pattern"), str)
    if not known or (isinstance(row.get("prompt"), str) == isinstance(row.get("messages"), list)):
        right = '"tests" (text)' if run_tests else '"answer" (text or number) or "pattern" (text)'
        raise InputError(f'{place}: expected {right} and one of "prompt" (text), "messages" (list)')
    if not run_tests and not _is_answer(row.get("answer")):
        grading.compiled(row["pattern"], f"{place}: pattern")
    if run_tests and not (row.get("function") or "name").isidentifier():
        raise InputError(f"{place}: function={row['function']!r}, expected the name of a function")


def _is_answer(value) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_right(row: dict, answer: str, find: re.Pattern | None) -> float:
    said = grading.extracted(answer, find)
    if _is_answer(row.get("answer")):
        return float(grading.same(said, str(row["answer"])))
    return float(said is not None and re.search(row["pattern"], said) is not None)


def _passes_tests(row: dict, answer: str, find: re.Pattern | None, seconds: int) -> float:
    code = grading.extracted(answer, find or _CODE)
    if code is None and find is None:
        code = answer
    return float(code is not None and programs.run_tests(code, row["tests"], row.get("function"), seconds))
