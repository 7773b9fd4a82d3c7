"""What an answer says, and whether it is what was expected."""

import pytest

from llada_jax.errors import InputError
from llada_jax.evaluation.grading import compiled, extracted, numbers_in, same


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("12,345", {"12345"}), ("12345.", {"12345"}), ("It is 12345!", {"12345"}), ("**12345**", {"12345"}),
        ("$12,345.", {"12345"}), ("数字是12345。", {"12345"}), ("１２，３４５", {"12345"}), ("12\u202f345", {"12345"}),
        ("1'234'567 or 12345", {"1234567", "12345"}), ("12345, 6", {"12345", "6"}), ("1-12345", {"1", "12345"}),
        ("112345", {"112345"}), ("12345.7", set()), ("3.12345", set()), ("x12345", set()), ("12345th", set()),
        ("1,12345", set()), ("12345,678", set()), ("", set()), ("none", set()),
    ],
)  # fmt: skip
def test_the_numbers_of_a_text(text, numbers):
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    "said, expected",
    [
        ("42", "42"), (" 42\n", "42"), ("42.", "42"), ("42,000", "42000"), ("42000", "42,000"), ("42.0", "42"),
        ("−7", "-7"), ("1\u00a0234.50", "1234.5"), ("Paris.", "Paris"), ("对。", "对"), ("", ""), ("U.S.", "U.S."),
    ],
)  # fmt: skip
def test_the_same_answer_in_other_words(said, expected):
    assert same(said, expected) and same(expected, said)


@pytest.mark.parametrize(
    "said, expected",
    [
        ("421", "42"), ("142", "42"), ("42 or 43", "42"), ("1,23", "123"), ("1,2", "12"), ("4 2", "42"), ("007", "7"),
        ("-42", "42"), ("42.5", "42"), ("", "42"), ("42", ""), (".", ""), ("paris", "Paris"), ("a...", "a.."),
        (None, ""), (None, "None"), ("nan", "inf"),
    ],
)  # fmt: skip
def test_another_answer(said, expected):
    assert not same(said, expected)


def test_the_part_that_counts():
    both = compiled(r"answer is (\d+)|#### (\d+)", "extract")
    assert extracted("the answer is 42", both) == "42" == extracted("#### 1, no: #### 42", both)
    assert extracted("#### 42, so the answer is 7", both) == "7" and extracted("17", both) is None
    assert extracted("3 of 4", compiled(r"\d+", "extract")) == "4" and extracted(" a ", None) == "a"
    assert (
        extracted("<>", compiled("<(.*)>", "extract")) == "" and extracted("(42)", compiled(r"(\()?(\d+)", "x")) == "("
    )
    assert extracted("42 done", compiled(r"(\d+)|done", "extract")) == "42"
    with pytest.raises(InputError, match=r"extract='\['"):
        compiled("[", "extract")
