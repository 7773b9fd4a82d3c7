"""The questions that a run trains on, a function of (seed, number), and those that it only evaluates on."""

import abc
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable

import numpy as np

from llada_jax.data.order import shuffled
from llada_jax.errors import InputError, check_range
from llada_jax.evaluation.questions import Question, file_questions, reasoning_gym_source

HELD_OUT_SEED = 1_000_000_007
_PREFIX = "reasoning_gym:"
_AT_ONCE = 64  # questions of one data set of reasoning-gym: some tasks take longer to open than to ask
_DRAWS = 200  # of a question that is none of the held-out ones
_KEPT = 4096  # questions in memory
_TRAINING_SEEDS = 1 << 31  # those of training are from here to 2^32, those of evaluation are below


class Questions(abc.ABC):
    """An endless supply of questions, numbered 0, 1, …; none is asked for before it is needed.

    Attributes: `held_out`, questions of evaluation only, for evaluation.tasks.answer_questions; `scoring`, that of
    every question; `digest`, hex, of all that the questions, their order and their scores depend on.
    """

    held_out: list[Question]
    scoring: dict
    digest: str

    def __init__(self):
        self.question: Callable[[int], Question] = functools.lru_cache(_KEPT)(self._make)

    def numbers(self, step: int, count: int) -> np.ndarray:
        """The numbers [count] int64 of the questions of a step. No two are equal, in this step or in another of a run
        whose steps all have `count`.
        """
        check_range("step", step, at_least=0)
        check_range("questions of a step", count, at_least=1)
        return step * count + np.arange(count, dtype=np.int64)

    @abc.abstractmethod
    def _make(self, number: int) -> Question:
        """The question with a number, which is none of `held_out`."""


def open_questions(
    source: str,
    settings: dict | None = None,
    seed: int = 0,
    held_out: int = 0,
    *,
    tests: bool = False,
    held_out_seed: int = HELD_OUT_SEED,
) -> Questions:
    """Opens the questions of a run.

    source: "reasoning_gym:TASK", whose questions are made, each new; or a JSONL file in the format of
    evaluation.questions.file_questions, in another order in every epoch.
    settings: those of the task; of a file, {"extract": pattern}, the part of an answer that counts.
    seed: of the questions or of their order. held_out: number of questions for evaluation only. Those of a task are a
    function of `held_out_seed`, so that runs of different seeds share them; those of a file are its last rows.
    tests: the rows of the file have "tests", which are run: for rewards of kind "code".

    No question of training equals a held-out one: such a question of a task is drawn again, and a file that has one is
    refused. Raises InputError naming source, file and line, or setting.
    """
    check_range("question seed", seed, at_least=0)
    check_range("held-out questions", held_out, at_least=0)
    check_range("seed of held-out questions", held_out_seed, at_least=0, below=_TRAINING_SEEDS - held_out)
    settings = dict(settings or {})
    if not source.startswith(_PREFIX):
        return FileQuestions(source, settings, seed, held_out, tests)
    if tests:
        raise InputError(f"{source}: only the rows of a file have tests")
    return MadeQuestions(source.removeprefix(_PREFIX), settings, seed, held_out, held_out_seed)


class MadeQuestions(Questions):
    """Questions of a reasoning-gym task: number i is a function of (seed, i)."""

    def __init__(self, name: str, settings: dict, seed: int, held_out: int, held_out_seed: int):
        super().__init__()
        self._name, self._settings, self._seed = name, settings, seed
        self._source = functools.lru_cache(16)(self._open)
        make = reasoning_gym_source(name, max(1, held_out), held_out_seed, settings)
        self.held_out = [make(index) for index in range(held_out)]
        self._refused = {question.asks() for question in self.held_out}
        self.scoring = self.question(0).scoring  # a task that cannot be asked is found now
        version = importlib.metadata.version("reasoning-gym")
        # Of the texts too: some tasks also depend on PYTHONHASHSEED.
        texts = [question.asks() for question in (self.question(0), *self.held_out)]
        self.digest = _digest([self.scoring, version, seed, held_out, held_out_seed, texts])

    def _open(self, group: int, draw: int) -> Callable[[int], Question]:
        state = np.random.SeedSequence((self._seed, group, draw)).generate_state(1)[0]
        seed = _TRAINING_SEEDS + int(state) % _TRAINING_SEEDS
        return reasoning_gym_source(self._name, _AT_ONCE, seed, self._settings)

    def _make(self, number: int) -> Question:
        group, index = divmod(number, _AT_ONCE)
        for draw in range(_DRAWS):
            question = self._source(group, draw)(index)
            if question.asks() not in self._refused:
                return question
        raise InputError(
            f"{_PREFIX}{self._name}: question {number} is one of the {len(self.held_out)} held-out ones in {_DRAWS} "
            "draws; hold out fewer, or ask for more variety by the settings"
        )


class FileQuestions(Questions):
    """The rows of a JSONL file, all of them in every epoch, without the last `held_out`."""

    def __init__(self, path: str, settings: dict, seed: int, held_out: int, tests: bool):
        super().__init__()
        extract = settings.get("extract")
        if unknown := sorted(set(settings) - {"extract"}):
            raise InputError(f"{path}: unknown setting {unknown[0]!r}; a file has: extract")
        if not isinstance(extract, str | None):
            raise InputError(f"{path}: extract={extract!r}, expected a regular expression")
        rows = file_questions(path, extract=extract, run_tests=tests)
        if held_out >= len(rows):
            raise InputError(f"{path}: {held_out} held-out questions leave none of {len(rows)} to train on")
        self._seed, self._rows = seed, rows[: len(rows) - held_out]
        self.held_out = rows[len(rows) - held_out :]
        self.scoring = self._rows[0].scoring
        places = {_whole(question): question.place for question in self.held_out}
        for question in self._rows:
            if (place := places.get(_whole(question))) is not None:
                raise InputError(f"{question.place}: the same question as {place}, which is held out")
        self.digest = _digest([[row.record for row in rows], self.scoring, seed, held_out])

    def __len__(self) -> int:
        """Number of different questions to train on: of an epoch."""
        return len(self._rows)

    def _make(self, number: int) -> Question:
        return self._rows[shuffled(number, len(self._rows), self._seed)[0]]


def _whole(question: Question) -> str:
    return json.dumps([question.messages, question.text, question.more], sort_keys=True)


def _digest(parts: list) -> str:
    try:
        text = json.dumps(parts, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"settings {parts[0]!r}: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()
