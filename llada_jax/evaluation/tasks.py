"""Scores generated answers: from questions to accuracy and tokens per forward pass, with standard errors."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from llada_jax.errors import InputError
from llada_jax.evaluation.questions import Question as Question
from llada_jax.evaluation.questions import file_questions as file_questions
from llada_jax.evaluation.questions import reasoning_gym_questions as reasoning_gym_questions
from llada_jax.evaluation.report import mean_error
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import GenerateConfig, eos_ids_of, prefill_execution


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
