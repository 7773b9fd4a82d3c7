"""Scores generated answers: from questions to accuracy and tokens per forward pass, with standard errors."""

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from llada_jax.data import chat, jsonl
from llada_jax.data.conversation import shapes
from llada_jax.errors import InputError
from llada_jax.evaluation import grading
from llada_jax.evaluation.report import mean_error
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import GenerateConfig, eos_ids_of, prefill_execution
from llada_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """messages: a conversation, or text: a bare prompt. score(answer): in [0, 1]. group: a set of questions whose mean
    score is also reported. more: other keys of the row, such as tools, as in data/chat.py. place: file and line, for
    error messages.
    """

    messages: list[dict] | None
    text: str | None
    score: Callable[[str], float]
    group: str = ""
    more: dict = dataclasses.field(default_factory=dict)
    place: str = ""

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


@dataclasses.dataclass(frozen=True)
class Result:
    """score: mean over questions. tokens_per_forward: sum of answer tokens, with the end of sequence, over the sum of
    denoising passes. *_stderr: standard errors over questions (of the ratio: delta method), None for a single question.
    scorer_errors: questions whose scorer failed, which count as wrong. ended: share of answers that reached their end.
    positions_evaluated: token positions in all passes, with prefill and commit. groups: score per group of questions.
    """

    questions: int
    score: float
    score_stderr: float | None
    scorer_errors: int
    tokens_per_forward: float
    tokens_per_forward_stderr: float | None
    ended: float
    answer_tokens: int
    forward_passes: int
    positions_evaluated: int
    seconds: float
    groups: dict[str, float]


def reasoning_gym_questions(name: str, size: int, seed: int = 0, settings: dict | None = None) -> list[Question]:
    """`size` questions of a reasoning-gym task, a function of the seed, with the task's own scorer.

    An answer scores 1 if the scorer gives it full marks, else 0. Raises InputError on an unknown task or setting, or if
    reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise InputError("reasoning-gym is not installed: pip install -e '.[eval]'") from error
    try:
        data = reasoning_gym.create_dataset(name, seed=seed, size=size, **(settings or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"reasoning_gym:{name}: {error}") from error

    def question(entry):
        def score(answer: str) -> float:
            return float(data.score_answer(answer.strip(), entry) >= 1)

        return Question([{"role": "user", "content": entry["question"]}], None, score)

    return [question(data[index]) for index in range(size)]


def file_questions(path: str, limit: int | None = None, extract: str | None = None) -> list[Question]:
    """Questions of a JSONL file: "prompt" (text) or "messages" (and "tools"), and "answer" or "pattern".

    "answer" (text or number): an answer is right if grading.same accepts it. "pattern": a regular expression that an
    answer must contain. extract: a regular expression; only its last match (grading.extracted) is scored, and an answer
    without a match is wrong. Raises InputError naming file and line.
    """
    find = grading.compiled(extract, "extract") if extract else None
    questions = []
    for place, row in itertools.islice(jsonl.read_values(path), limit):
        known = isinstance(row, dict) and _is_answer(row.get("answer")) != isinstance(row.get("pattern"), str)
        if not known or (isinstance(row.get("prompt"), str) == isinstance(row.get("messages"), list)):
            raise InputError(
                f'{place}: expected "answer" (text or number) or "pattern" (text) and one of "prompt" (text), '
                '"messages" (list)'
            )
        score = _right_answer(row, find, place)
        more = {name: row[name] for name in (*shapes.CONTEXT, *shapes.MORE, *shapes.MEDIA) if row.get(name)}
        questions.append(Question(row.get("messages"), row.get("prompt"), score, more=more, place=place))
    if not questions:
        raise InputError(f"{path}: no questions")
    return questions


def _is_answer(value) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _right_answer(row: dict, find: re.Pattern | None, place: str) -> Callable[[str], float]:
    if _is_answer(row.get("answer")):
        expected = str(row["answer"])
        return lambda answer: float(grading.same(grading.extracted(answer, find), expected))
    pattern = grading.compiled(row["pattern"], f"{place}: pattern")

    def matches(answer: str) -> float:
        said = grading.extracted(answer, find)
        return float(said is not None and pattern.search(said) is not None)

    return matches


def answer_questions(
    model, questions: Sequence[Question], config: GenerateConfig, batch: int = 64, seed: int = 0, log=None
) -> tuple[Result, list[dict]]:
    """Decodes an answer to every question, `batch` at a time.

    model: from checkpoint.weights.load_checkpoint, with a tokenizer. seed: of the draws at temperature > 0; two seeds
    share none. log: a function that receives a line of progress after every `batch` answers.

    Returns the result and one record per question: prompt, answer, score, tokens, forward_passes and others. If a
    scorer raises, or returns no number in [0, 1], the score is 0 and the record has an "error".
    """
    if model.tokenizer is None:
        raise InputError("the checkpoint has no tokenizer")
    if not questions:
        raise InputError("no questions")
    prompts = [question.prompt(model.tokenizer) for question in questions]
    ids = [np.asarray(question.encode(model.tokenizer), np.int32) for question in questions]
    requests = [Request(prompt, config, (seed, index)) for index, prompt in enumerate(ids)]
    max_length = max(map(len, ids)) + config.gen_length
    ends = eos_ids_of(model.config, config)
    records, begin = [], time.perf_counter()
    answers = serve(
        model.params, model.config, requests, min(batch, len(ids)), max_length, model.tokenizer,
        execution=prefill_execution(max(map(len, ids))),
    )  # fmt: skip
    for answer in answers:
        records.append(
            {
                "index": answer.index,
                "prompt": prompts[answer.index],
                "answer": answer.text,
                **_scored(questions[answer.index], answer.text),
                "tokens": len(answer.tokens),
                "forward_passes": answer.forward_passes,
                "positions_evaluated": answer.positions_evaluated,
                "group": questions[answer.index].group,
                "ended": bool(len(answer.tokens) and answer.tokens[-1] in ends),
            }
        )
        if log is not None and (len(records) % batch == 0 or len(records) == len(ids)):
            seconds = time.perf_counter() - begin
            left = seconds / len(records) * (len(ids) - len(records))
            log(f"{len(records)}/{len(ids)} questions, {left:.0f} s left")
    records.sort(key=lambda record: record["index"])
    return summarize(records, time.perf_counter() - begin), records


def _scored(question: Question, answer: str) -> dict:
    """{"score"}, and "error" if the scorer failed, which must not end the run."""
    try:
        score = float(question.score(answer))
        if not 0 <= score <= 1:
            raise ValueError(f"the scorer gave {score}, expected a number in [0, 1]")
        return {"score": score}
    except (Exception, SystemExit) as error:
        return {"score": 0.0, "error": f"{type(error).__name__}: {error}"}


def summarize(records: Sequence[dict], seconds: float = 0.0) -> Result:
    """The result of records as answer_questions returns them."""
    scores = np.array([record["score"] for record in records], float)
    tokens = np.array([record["tokens"] for record in records], float)
    passes = np.array([record["forward_passes"] for record in records], float)
    count = len(records)
    ratio = tokens.sum() / max(passes.sum(), 1)
    score, score_stderr = mean_error(scores)
    _, spread = mean_error(tokens - ratio * passes)
    return Result(
        questions=count,
        score=score,
        score_stderr=score_stderr,
        scorer_errors=sum("error" in record for record in records),
        tokens_per_forward=float(ratio),
        tokens_per_forward_stderr=None if spread is None else float(spread / max(passes.mean(), 1e-9)),
        ended=float(np.mean([record["ended"] for record in records])),
        answer_tokens=int(tokens.sum()),
        forward_passes=int(passes.sum()),
        positions_evaluated=sum(record["positions_evaluated"] for record in records),
        seconds=round(seconds, 2),
        groups=_scores_by_group(records),
    )


def _scores_by_group(records: Sequence[dict]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for record in records:
        if record["group"]:
            scores.setdefault(record["group"], []).append(record["score"])
    return {group: float(np.mean(values)) for group, values in scores.items()}
