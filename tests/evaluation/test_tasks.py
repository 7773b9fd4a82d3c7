"""Questions, their scores, and the standard errors of what is reported."""

import json

import jax
import numpy as np
import pytest

from llada_jax.checkpoint.weights import Model
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.evaluation import tasks
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.generate import GenerateConfig, generate


@pytest.fixture(scope="module")
def model():
    config = preset("tiny").replace(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
    params = parameters.initialize(config, jax.random.key(0, impl="threefry2x32"))
    return Model(config, params, byte_tokenizer(config.eos_token_id, config.mask_token_id), {})


def record(score, tokens, passes):
    return {"score": score, "tokens": tokens, "forward_passes": passes, "ended": True, "positions_evaluated": passes,
            "group": f"{passes} passes"}  # fmt: skip


def test_standard_errors_are_those_of_the_mean_and_of_the_ratio():
    """Over many repetitions, the spread of the reported numbers is the reported error."""
    rng = np.random.default_rng(0)

    def draw():
        passes = rng.integers(1, 9, 200)
        tokens = passes + rng.integers(0, 9, 200)
        scores = rng.random(200) < 0.3
        return tasks.summarize([record(*row) for row in zip(scores, tokens, passes, strict=True)])

    results = [draw() for _ in range(400)]
    for name in ("score", "tokens_per_forward"):
        spread = np.std([getattr(result, name) for result in results])
        reported = np.mean([getattr(result, name + "_stderr") for result in results])
        assert reported == pytest.approx(spread, rel=0.12), name


def test_tokens_per_forward_is_a_ratio_of_sums():
    result = tasks.summarize([record(1.0, 30, 3), record(0.0, 1, 1)])
    assert (result.tokens_per_forward, result.score, result.answer_tokens) == (31 / 4, 0.5, 31)


def test_answers_are_those_of_generate_and_do_not_depend_on_the_batch(model, tmp_path):
    prompts = ["a", "some longer prompt of bytes", "bc", "x" * 40]
    config = GenerateConfig(gen_length=8, block_length=4, threshold=0.0)
    alone = [generate(model.params, model.config, [model.tokenizer.encode(text)], config) for text in prompts]
    texts = [model.tokenizer.decode(out.tokens[0], skip_special_tokens=True) for out in alone]
    rows = [{"prompt": p, "answer": t if i != 1 else t + "?"} for i, (p, t) in enumerate(zip(prompts, texts))]  # noqa: B905
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for batch in (1, 3):
        result, records = tasks.answer_questions(model, tasks.file_questions(str(path)), config, batch)
        assert [r["answer"] for r in records] == texts
        assert [r["forward_passes"] for r in records] == [int(out.forward_passes[0]) for out in alone]
        assert [r["score"] for r in records] == [1, 0, 1, 1] and result.score == 0.75


def questions_scored(*scorers):
    return [tasks.Question(None, "abc"[: 1 + i], score) for i, score in enumerate(scorers)]


def test_a_scorer_that_fails_is_counted_and_ends_nothing(model):
    """It raises, exits, gives no number, or one that is out of range."""

    def leave(answer):
        raise SystemExit(0)

    scorers = [lambda a: {}["x"], leave, lambda a: None, lambda a: float("nan"), lambda a: 2.0, lambda a: 1.0]
    config = GenerateConfig(gen_length=4, block_length=4, threshold=0.0)
    result, records = tasks.answer_questions(model, questions_scored(*scorers), config)
    assert result.scorer_errors == 5 and result.score == pytest.approx(1 / 6) and result.questions == 6
    assert [record["score"] for record in records] == [0, 0, 0, 0, 0, 1]
    assert records[0]["error"] == "KeyError: 'x'" and "nan" in records[3]["error"] and "error" not in records[5]
    with pytest.raises(InputError, match="no questions"):
        tasks.answer_questions(model, [], config)


def test_one_question_has_no_standard_error():
    result = tasks.summarize([record(1.0, 3, 3)])
    assert result.score_stderr is result.tokens_per_forward_stderr is None and result.score == 1


def test_seeds_share_no_draws_however_many_questions_there_are(model):
    """The same question again and again: its answers differ within a seed and across seeds and numbers of questions."""
    config = GenerateConfig(gen_length=8, block_length=4, temperature=1.0)

    def answers(count, seed):
        questions = [tasks.Question(None, "a", lambda a: 1.0)] * count
        return [record["answer"] for record in tasks.answer_questions(model, questions, config, 4, seed)[1]]

    found = [answers(count, seed) for count, seed in ((4, 0), (2, 1), (3, 2), (2, 2**32 - 1))]
    assert len({text for texts in found for text in texts}) == 11
    assert answers(2, 0) == found[0][:2]
    with pytest.raises(InputError, match=r"seed=\(-1, 0\)"):
        answers(1, -1)


def test_scores_are_given_by_group():
    result = tasks.summarize([record(1.0, 3, 3), record(0.0, 1, 3), record(1.0, 1, 1)])
    assert result.groups == {"3 passes": 0.5, "1 passes": 1.0} and result.positions_evaluated == 7
