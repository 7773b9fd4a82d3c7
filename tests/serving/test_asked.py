"""Fields of requests: what is honoured, what is accepted because it asks for nothing, what is refused and how."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.serving.asked import Chat, Completion, read
from llada_jax.serving.refusals import Refused

COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def asked(kind, **fields):
    return read(kind, json.dumps((CHAT if kind is Chat else COMPLETION) | fields).encode())


def refused(kind, **fields) -> Refused:
    with pytest.raises(Refused) as caught:
        asked(kind, **fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "prompt, prompts", [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])]
)
def test_a_prompt_is_a_text_or_ids_or_several(prompt, prompts):
    assert asked(Completion, prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [[1], "a"], [1, True], [-1], [1.5], {}, 3, [["a"]], [[[1]]]])
def test_other_prompts_are_refused(prompt):
    assert refused(Completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_null_is_absent_and_decoding_is_what_is_set(kind):
    given_fields = asked(kind, temperature=None, threshold=0.5, top_k=-1, steps=3, stop=None, n=None, seed=None)
    assert given_fields.decoding == {"threshold": 0.5, "top_k": None, "steps": 3}
    assert (given_fields.n, given_fields.stop, given_fields.seed) == (1, [], None)
    assert asked(kind, stop="x").stop == ["x"] and asked(kind, stop=["x", "y"]).stop == ["x", "y"]


@pytest.mark.parametrize(
    "kind, field, wrong",
    [
        *((kind, "temperature", value) for kind in (Completion, Chat) for value in (-0.1, 2.1, "1", True, [1])),
        *((Chat, "n", value) for value in (0, 129, "1", 1.5, True)),
        *((Chat, "max_tokens", value) for value in (0, -1, "8", 2**31, 1.5, True)),
        *((Chat, "seed", value) for value in (-1, 2**32, "1", 1.5)),
        *((Chat, "stop", value) for value in ("", [""], [1], 1, ["x"] * 65, {"a": 1}, "x" * 1001)),
        *((Completion, "logprobs", value) for value in (True, -1, 6, 2)),
        (Completion, "prompt", ["a"] * 129),
        *((Chat, "logprobs", value) for value in (1, "true")),
        *((Chat, "messages", value) for value in ("a", [], {}, [1], [[]], [{"content": "a"}], [{"role": 1}])),
        *((Chat, "tools", value) for value in ("x", [{}], [{"type": "function"}], [{"function": {"name": " "}}])),
        *((kind, "block_length", 10**4000) for kind in (Completion, Chat)),
        (Chat, "tool_choice", "required"),
        (Chat, "tool_choice", {"type": "function", "function": {"name": "f"}}),
        (Chat, "stream", 1),
        (Chat, "stream_options", {"include_usage": True}),
        (Chat, "provisional", True),
        (Chat, "top_logprobs", 1),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(kind, field, wrong):
    error = refused(kind, **{field: wrong})
    assert error.param.startswith(field) and field in str(error) and "\n" not in str(error)
    assert error.body["error"]["type"] == "invalid_request_error" and len(str(error)) < 300


@pytest.mark.parametrize(
    "kind, field, neutral, other",
    [
        *((kind, "presence_penalty", 0, 0.5) for kind in (Completion, Chat)),
        *((kind, "frequency_penalty", 0.0, -1) for kind in (Completion, Chat)),
        *((kind, "logit_bias", {}, {"5": 1}) for kind in (Completion, Chat)),
        (Completion, "best_of", 1, 2),
        (Completion, "suffix", None, "x"),
        (Completion, "presence_penalty", 0, False),
        (Chat, "response_format", {"type": "text"}, {"type": "json_object"}),
        (Chat, "modalities", ["text"], ["text", "audio"]),
        (Chat, "audio", None, {"voice": "x"}),
        (Chat, "parallel_tool_calls", True, False),
        (Chat, "store", False, True),
        (Chat, "user", "somebody", 3),
        (Chat, "reasoning_effort", None, "low"),
        (Chat, "functions", [], [{"name": "f"}]),
        (Chat, "min_p", 0, 0.1),
    ],
)
def test_what_is_not_honoured_is_accepted_only_where_it_asks_for_nothing(kind, field, neutral, other):
    assert asked(kind, **{field: neutral}).model_dump() == asked(kind).model_dump()
    error = refused(kind, **{field: other})
    assert (error.param, error.code) == (field, "unsupported") and "cannot be honoured" in str(error)


def test_as_many_of_the_best_as_are_asked_for_are_all():
    assert asked(Completion, n=3, best_of=3).n == 3


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_an_unknown_field_is_refused_with_the_one_that_is_near(kind):
    error = refused(kind, temprature=1)
    assert (error.param, error.code) == ("temprature", "unknown_field") and "did you mean temperature?" in str(error)
    assert refused(kind, zzz=1).param == "zzz" and refused(kind, stream_options={"x": 1}, stream=True).param


def test_messages_may_come_back_as_they_were_answered_and_hold_no_unknown_fields():
    message = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None}
    found = asked(Chat, messages=[*CHAT["messages"], message, *CHAT["messages"]])
    assert found.messages[1] == {"role": "assistant", "content": "b"}
    assert "messages[0]: unknown field 'zzz'" in str(refused(Chat, messages=[CHAT["messages"][0] | {"zzz": 1}]))


def test_the_newer_name_of_max_tokens():
    assert asked(Chat, max_completion_tokens=5).max_tokens == 5
    assert asked(Chat, max_completion_tokens=5, max_tokens=5).max_tokens == 5
    assert refused(Chat, max_completion_tokens=5, max_tokens=6).param == "max_completion_tokens"
    assert refused(Chat, max_completion_tokens="5").param == "max_completion_tokens"


def test_prompts_get_no_likelihoods():
    assert asked(Completion, echo=True).echo and asked(Completion, logprobs=1).alternatives == 1
    assert "llada_jax.evaluation.lm_eval" in str(refused(Completion, echo=True, logprobs=1))


@pytest.mark.parametrize(
    "body, why",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model": "\xed\xa0\x80", "messages": [{}]}', "not JSON"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": NaN}', "NaN is no number"),
        (b'{"model": "m", "messages": [{}], "top_p": 1e999}', "top_p=inf"),
        (b'{"n": 1, "n": 2}', "'n' stands there twice"),
    ],
)
def test_a_body_that_is_no_clear_json_is_refused(body, why):
    with pytest.raises(Refused, match=why):
        read(Chat, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from((Completion, Chat)), st.data())
def test_whatever_is_asked_is_read_or_refused(kind, data):
    names = st.sampled_from([*kind.model_fields, "logit_bias", "response_format"]) | st.text(max_size=4)
    fields = data.draw(st.dictionaries(names, JSON, max_size=4))
    body = json.dumps((CHAT if kind is Chat else COMPLETION) | fields).encode()
    try:
        assert isinstance(read(kind, body), kind)
    except Refused as error:
        assert error.status == 400 and len(str(error)) < 400 and json.dumps(error.body)
