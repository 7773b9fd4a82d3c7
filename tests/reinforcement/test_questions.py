"""The questions of a run: functions of (seed, number), and none that is held out."""

import json

import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.evaluation import tasks
from llada_jax.reinforcement.questions import open_questions
from tests.helpers.data_helpers import CHATML, with_template, write_rows

TASK = "reasoning_gym:number_filtering"
SMALL = dict(min_numbers=1, max_numbers=1, min_decimals=0, max_decimals=0, min_value=0, max_value=3)


def rows(count):
    return [{"prompt": f"question {i}", "answer": i} for i in range(count)]


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "q.jsonl", rows(20))


def asked(questions, numbers):
    return [questions.question(int(number)).asks() for number in numbers]


def test_numbers_are_a_function_of_the_step_and_no_two_steps_share_one(file):
    questions = open_questions(file)
    steps = [questions.numbers(step, 6) for step in range(5)]
    assert np.unique(np.concatenate(steps)).size == 30 and steps[0].dtype == np.int64
    np.testing.assert_array_equal(questions.numbers(3, 6), steps[3])
    for step, count, message in ((-1, 6, "step=-1"), (0, 0, "questions of a step=0")):
        with pytest.raises(InputError, match=message):
            questions.numbers(step, count)


def test_made_questions_are_a_function_of_seed_and_number_in_whatever_order():
    first, again, other = (open_questions(TASK, seed=seed) for seed in (5, 5, 6))
    numbers = [0, 3, 63, 64, 65, 1000, 10**9]
    texts = asked(first, numbers)
    assert asked(again, numbers[::-1])[::-1] == texts and len(set(texts)) == len(numbers)
    assert not set(asked(other, range(130))) & set(asked(first, range(130)))
    assert not set(asked(first, range(64))) & set(asked(first, range(64, 128)))


def test_made_questions_have_their_record_score_and_prompt():
    question = open_questions(TASK, seed=1).question(7)
    record = question.record
    assert record["question"] == question.asks() == question.messages[0]["content"]
    assert record["entry"]["answer"] == record["answer"] and question.score(record["answer"]) == 1
    assert question.score("['0.5']") == 0
    tokenizer = with_template(CHATML)
    assert question.asks() in tokenizer.decode(question.encode(tokenizer))


def test_no_made_question_is_one_that_is_held_out():
    """Of the few questions that there are, half are held out."""
    runs = [open_questions(TASK, SMALL, seed, held_out=20) for seed in (0, 1)]
    held_out = [{question.asks() for question in run.held_out} for run in runs]
    assert held_out[0] == held_out[1] and len(runs[0].held_out) == 20
    assert held_out[0] != {q.asks() for q in open_questions(TASK, SMALL, 0, 20, held_out_seed=3).held_out}
    free = open_questions(TASK, SMALL, seed=0)
    assert held_out[0] & set(asked(free, range(200)))  # they would be asked
    for run in runs:
        assert not held_out[0] & set(asked(run, range(200)))
    with pytest.raises(InputError, match="question 0 is one of the 2000 held-out ones in 200 draws"):
        open_questions(TASK, SMALL, held_out=2000)


def test_made_questions_that_are_held_out_are_those_of_evaluation():
    held_out = open_questions(TASK, seed=8, held_out=4, held_out_seed=77).held_out
    expected = tasks.reasoning_gym_questions("number_filtering", 4, seed=77)
    assert [question.asks() for question in held_out] == [question.asks() for question in expected]


def test_every_epoch_of_a_file_has_every_row_once_in_an_order_of_its_own(file):
    first, again, other = (open_questions(file, seed=seed, held_out=5) for seed in (2, 2, 3))
    epochs = [asked(first, range(15 * e, 15 * (e + 1))) for e in range(3)]
    assert all(sorted(epoch) == sorted(row["prompt"] for row in rows(15)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and len(first) == 15
    assert asked(again, range(45)) == sum(epochs, []) != asked(other, range(45))
    assert asked(other, range(15)) != epochs[1]  # seeds are no epochs
    assert [question.asks() for question in first.held_out] == [row["prompt"] for row in rows(20)[15:]]
    one = open_questions(file, held_out=19)
    assert asked(one, range(3)) == ["question 0"] * 3


def test_questions_of_a_file_have_their_row_score_and_prompt(file):
    question = open_questions(file, {"extract": r"is (\d+)"}).question(4)
    right = question.record["answer"]
    assert question.record in rows(20) and question.place.endswith(f"q.jsonl:{right + 1}")
    assert question.score(f"7? it is {right}") == 1 and question.score(f"{right}") == 0
    assert with_template("").decode(question.encode(with_template(""))) == question.text


def test_the_digest_is_of_all_that_the_questions_depend_on(file, tmp_path):
    def digests(source, *changes):
        plain = dict(settings={}, seed=1, held_out=2)
        found = [open_questions(source, **plain | change).digest for change in ({}, {}, *changes)]
        assert found[0] == found[1] and len(set(found)) == len(changes) + 1
        return found[0]

    digests(TASK, {"seed": 2}, {"held_out": 3}, {"held_out_seed": 3}, {"settings": {"max_numbers": 5}})
    before = digests(file, {"seed": 2}, {"held_out": 3}, {"settings": {"extract": "."}})
    write_rows(tmp_path / "q.jsonl", [*rows(19), {"prompt": "question 19", "answer": 3}])
    assert open_questions(file, seed=1, held_out=2).digest != before


@pytest.mark.parametrize(
    "source, more, message",
    [
        ("reasoning_gym:no_such", {}, "reasoning_gym:no_such: .*not registered"),
        (TASK, {"settings": {"min_lumbers": 3}}, f"{TASK}: .*min_lumbers"),
        (TASK, {"settings": {"seed": 3}}, f"{TASK}: .*seed"),
        (TASK, {"settings": {"min_numbers": "a"}}, f"{TASK}: "),
        (TASK, {"tests": True}, f"{TASK}: only the rows of a file have tests"),
        (TASK, {"seed": -1}, "question seed=-1"),
        (TASK, {"held_out": -1}, "held-out questions=-1"),
        (TASK, {"held_out_seed": 1 << 31}, "seed of held-out questions=2147483648"),
        ("FILE", {"settings": {"extrakt": "a"}}, "q.jsonl: unknown setting 'extrakt'"),
        ("FILE", {"settings": {"extract": "("}}, r"extract='\('"),
        ("FILE", {"settings": {"extract": 3}}, "extract=3, expected a regular expression"),
        ("FILE", {"held_out": 20}, "q.jsonl: 20 held-out questions leave none of 20 to train on"),
        ("FILE", {"tests": True}, r'q.jsonl:1: expected "tests" \(text\)'),
        ("none.jsonl", {}, "none.jsonl: no such file"),
    ],
)
def test_bad_sources_and_settings_are_one_line(file, source, more, message):
    with pytest.raises(InputError, match=message) as error:
        open_questions(file if source == "FILE" else source, **more)
    assert "\n" not in str(error.value)


def test_a_file_that_trains_on_what_is_held_out_is_refused(tmp_path):
    """The same prompt under another answer is the same question; another system turn is not."""
    row = rows(3)[1]
    path = write_rows(tmp_path / "q.jsonl", [*rows(3), row | {"answer": 7}])
    with pytest.raises(InputError, match=r"q\.jsonl:2: the same question as .*q\.jsonl:4, which is held out"):
        open_questions(path, held_out=1)
    assert len(open_questions(path)) == 4
    write_rows(tmp_path / "q.jsonl", [*rows(3), row | {"system": "Be brief."}])
    assert len(open_questions(path, held_out=1)) == 3
    assert json.dumps(open_questions(path).question(0).record)


def test_rows_with_tests_name_what_is_wrong(tmp_path):
    good = {"prompt": "a", "tests": "assert f()"}
    for bad, message in (
        (good | {"function": "f()"}, r"q\.jsonl:2: function='f\(\)', expected the name of a function"),
        (good | {"function": 3}, r'q\.jsonl:2: expected "tests"'),
        ({"prompt": "a", "tests": 3}, r'q\.jsonl:2: expected "tests"'),
    ):
        with pytest.raises(InputError, match=message):
            open_questions(write_rows(tmp_path / "q.jsonl", [good, bad]), tests=True)
