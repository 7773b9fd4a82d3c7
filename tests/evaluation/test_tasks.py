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
from tests.helpers.data_helpers import CHATML, message, with_template, write_rows


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


def test_reasoning_gym_questions_are_a_function_of_the_seed_and_score_their_own_solutions():
    import reasoning_gym

    settings = {"min_numbers": 3, "max_numbers": 5}
    questions = tasks.reasoning_gym_questions("number_filtering", 5, seed=3, settings=settings)
    data = reasoning_gym.create_dataset("number_filtering", seed=3, size=5, **settings)
    for question, entry in zip(questions, data, strict=True):
        assert question.messages == [{"role": "user", "content": entry["question"]}]
        assert question.score(f" {entry['answer']}\n") == 1 and question.score("['0.123']") == 0


@pytest.mark.parametrize("name, settings", [("no_such_task", {}), ("number_filtering", {"min_lumbers": 3})])
def test_unknown_tasks_and_settings_are_named(name, settings):
    with pytest.raises(InputError, match=f"reasoning_gym:{name}: .*"):
        tasks.reasoning_gym_questions(name, 5, settings=settings)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "q.jsonl:2: malformed JSON"),
        ('{"prompt": "a"}', 'q.jsonl:2: expected "answer"'),
        ('{"prompt": "a", "messages": [], "answer": "b"}', 'q.jsonl:2: expected "answer"'),
        ("3", 'q.jsonl:2: expected "answer"'),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        tasks.file_questions(str(path))
    with pytest.raises(InputError, match="no such file"):
        tasks.file_questions(str(tmp_path / "none.jsonl"))


def test_tools_and_the_system_turn_of_a_question_are_in_its_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [message("user", "Paris?")], "tools": tools, "system": "s", "answer": "sunny", "id": 3}
    path = write_rows(tmp_path / "q.jsonl", [row, row | {"messages": [{"role": "user"}]}])
    good, bad = tasks.file_questions(path)
    whole = [message("system", "s"), message("user", "Paris?")]
    assert good.prompt(with_template(CHATML)) == with_template(CHATML).apply_chat_template(whole, tools=tools)
    plain = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match=r"q\.jsonl:1: the chat template leaves out what tools say: 'weather'"):
        good.prompt(plain)
    with pytest.raises(InputError, match=r"q\.jsonl:2: messages\[0\]: content is not a string"):
        bad.prompt(plain)
    with pytest.raises(InputError, match="prompt is empty"):
        tasks.Question(None, "", float).prompt(plain)


def test_answers_by_pattern_and_the_part_that_counts(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "a", "answer": "12"}, {"prompt": "a", "pattern": "^1.$"}, {"prompt": "a", "pattern": "no"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    said = "so 3, no: The answer is 12."
    assert [question.score(said) for question in tasks.file_questions(str(path))] == [0, 0, 1]
    for extract in (r"answer is (\d+)", r"\d+"):  # the first group, or the whole; of the last match
        assert [q.score(said) for q in tasks.file_questions(str(path), extract=extract)] == [1, 1, 0]
        assert [q.score("none") for q in tasks.file_questions(str(path), extract=extract)] == [0, 0, 0]
    with pytest.raises(InputError, match=r"extract='\('"):
        tasks.file_questions(str(path), extract="(")
    path.write_text('{"prompt": "a", "pattern": "("}')
    with pytest.raises(InputError, match=r"q.jsonl:1: pattern='\('"):
        tasks.file_questions(str(path))


def test_answers_of_files_are_graded_by_what_they_say(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "a", "answer": text} for text in ("1,234", "", 1234, 0.5)] + [{"prompt": "a", "pattern": ".*"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    for said, scores in (("1234.", [1, 0, 1, 0, 1]), ("", [0, 1, 0, 0, 1]), ("0.50", [0, 0, 0, 1, 1])):
        assert [question.score(said) for question in tasks.file_questions(str(path))] == scores, said
    marked = tasks.file_questions(str(path), extract=r"A: (\d+)|B: (\d+)")
    for said, scores in (("B: 1234", [1, 0, 1, 0, 1]), ("1234", [0] * 5), ("A: 11234", [0, 0, 0, 0, 1])):
        assert [question.score(said) for question in marked] == scores, said


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
