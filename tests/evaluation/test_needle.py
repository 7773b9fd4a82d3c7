"""Questions about needles in a haystack."""

import re

import pytest

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.evaluation.needle import needle_questions

TOKENIZER = byte_tokenizer(256)


@pytest.mark.parametrize("needles", [1, 4])
def test_needles_lie_at_even_depths_in_texts_of_the_asked_length(needles):
    questions = needle_questions(TOKENIZER, 2000, 5, needles, seed=1)
    assert [question.group for question in questions] == [f"depth {d:.2f}" for d in (0, 0.25, 0.5, 0.75, 1)]
    for question, depth in zip(questions, (0, 0.25, 0.5, 0.75, 1), strict=True):
        assert 1900 < len(TOKENIZER.encode(question.text)) <= 2010
        facts = dict(re.findall(r"The magic number of (\w+) is (\d+)\.", question.text))
        assert len(facts) == needles
        asked = re.search(r"magic number of (\w+)\?", question.text).group(1)
        place = question.text.index(f"of {asked} is") / len(question.text)
        assert place == pytest.approx(depth, abs=0.12)
        assert question.score(f" It is {facts[asked]}.") == 1
        assert all(question.score(number) == 0 for name, number in facts.items() if name != asked)


def test_the_number_and_no_other_is_the_answer():
    question = needle_questions(TOKENIZER, 800, 1, needles=3, seed=4)[0]
    asked = re.search(r"magic number of (\w+)\?", question.text).group(1)
    facts = dict(re.findall(r"The magic number of (\w+) is (\d+)\.", question.text))
    number, (other, *_) = facts.pop(asked), facts.values()
    for answer in (number, f"{number}.", f"{number[:2]},{number[2:]}", f"It is **{number}**: {number}, found 1 time"):
        assert question.score(answer) == 1, answer
    for answer in (f"1{number}", f"{number}7", f"0.{number}", f"{number}.5", f"{number} or {other}", other, ""):
        assert question.score(answer) == 0, answer


def test_a_function_of_the_seed():
    texts = [[q.text for q in needle_questions(TOKENIZER, 500, 3, seed=seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] and not set(texts[0]) & set(texts[2])


@pytest.mark.parametrize(
    "arguments, message", [((100, 1), "context=100"), ((900, 0), "questions=0"), ((900, 1, 99), "needles=99")]
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        needle_questions(TOKENIZER, *arguments)
