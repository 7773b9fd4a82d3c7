"""The text of an answer as it comes, against the text of the whole answer cut at the first stop text."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.evaluation.lm_eval_requests import answer_text
from llada_jax.serving.text import AnswerText
from tests.helpers.foreign_tokenizers import byte_level, llama_like, metaspace, words

FAMILIES = {make.__name__: make() for make in (llama_like, metaspace, byte_level, words)}
FAMILIES["bytes"] = byte_tokenizer(256)
TEXTS = ("def f():\n    return 'the'", " the  cat 猫は 🙂é.", "the the", "    x", "aaab aab ab", "🙂🙂 猫猫")
of_each_family = pytest.mark.parametrize("family", FAMILIES)


def streamed(tokenizer, prompt, tokens, stops, cuts):
    """(the parts that were given, the AnswerText) of tokens that come in parts that end at `cuts`."""
    answer, parts, edges = AnswerText(tokenizer, prompt, stops), [], sorted({0, *cuts, len(tokens)})
    for start, end in zip(edges, edges[1:], strict=False):
        parts.append(answer.feed(tokens[start:end]))
    return [*parts, answer.end()], answer


@st.composite
def answers(draw):
    """(tokenizer, prompt, tokens, stops, cuts): texts, and ids at random, special and unknown ones among them."""
    tokenizer = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    texts = draw(st.lists(st.sampled_from(TEXTS), max_size=3))
    ids = [i for text in texts for i in tokenizer.encode(text)]
    ids += draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12))
    random.Random(draw(st.integers(0, 99))).shuffle(ids) if draw(st.booleans()) else None
    prompt = tokenizer.encode(draw(st.sampled_from(("", "a", "the 猫")))) + draw(st.sampled_from(([], [1], ids[:1])))
    written = tokenizer.decode_after(prompt, ids, skip_special_tokens=False)
    stops = []
    for _ in range(draw(st.integers(0, 3))):
        start, size = draw(st.integers(0, max(len(written) - 1, 0))), draw(st.integers(1, 4))
        stops.append(written[start : start + size] + draw(st.sampled_from(("", "", "x"))))
    cuts = draw(st.lists(st.integers(0, len(ids)), max_size=6))
    return tokenizer, prompt, ids, [stop for stop in stops if stop], cuts


@given(answers())
def test_what_comes_joins_to_the_whole_answer_up_to_the_first_stop(case):
    tokenizer, prompt, ids, stops, cuts = case
    parts, answer = streamed(tokenizer, prompt, ids, stops, cuts)
    whole = answer_text(tokenizer, prompt, ids, stops)
    assert "".join(part.text for part in parts) == whole
    every, by_one = streamed(tokenizer, prompt, ids, stops, range(len(ids)))
    assert "".join(part.text for part in every) == whole
    assert (answer.stopped, answer.count) == (by_one.stopped, by_one.count)
    assert answer.count == len(ids) if not answer.stopped else answer.count <= len(ids)
    at_once = AnswerText(tokenizer, prompt, stops, each=False)
    assert at_once.feed(ids).text + at_once.end().text == whole and at_once.count == answer.count
    numbers = [i for part in parts for i in range(part.first, part.last)]
    assert numbers == list(range(len(numbers))) and (answer.stopped or len(numbers) == len(ids))
    assert answer.offsets == sorted(answer.offsets) and all(answer.offsets[i] <= len(whole) for i in numbers)


@of_each_family
def test_no_part_ends_inside_a_character(family):
    tokenizer = FAMILIES[family]
    ids = [i for text in TEXTS for i in tokenizer.encode(text)]
    parts, _ = streamed(tokenizer, tokenizer.encode("a"), ids, (), range(len(ids)))
    assert all("\ufffd" not in part.text for part in parts) and len([part for part in parts if part.text]) > 5


def test_only_what_may_begin_a_stop_is_held_back():
    answer = AnswerText(FAMILIES["bytes"], [1], ["abcd", "bc!"])
    given = [answer.feed([byte]).text for byte in b"xabcxabd"]
    assert given == ["x", "", "", "", "abcx", "", "", "abd"] and not answer.stopped


def test_of_two_stops_the_one_that_begins_first_counts_even_if_it_ends_last():
    for cuts in (range(9), (), (3,)):
        parts, answer = streamed(FAMILIES["bytes"], [1], list(b"xabcdy"), ["bc", "abcd"], cuts)
        assert ("".join(part.text for part in parts), answer.count) == ("x", 5)
    parts, answer = streamed(FAMILIES["bytes"], [1], list(b"xabc"), ["bc", "abcd"], range(9))
    assert ("".join(part.text for part in parts), answer.stopped, answer.count) == ("xa", True, 4)


def test_a_stop_may_name_a_special_token_that_is_not_shown():
    tokenizer = FAMILIES["byte_level"]
    ids = [*tokenizer.encode("the"), 1, *tokenizer.encode("cat")]
    parts, answer = streamed(tokenizer, tokenizer.encode("a"), ids, ["<s>"], range(9))
    assert ("".join(part.text for part in parts), answer.stopped) == ("the", True)
    parts, answer = streamed(tokenizer, tokenizer.encode("a"), ids, ["<S>"], range(9))
    assert ("".join(part.text for part in parts), answer.stopped) == ("thecat", False)
