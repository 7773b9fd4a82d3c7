import json

import pytest

from llada_jax.data import chat
from llada_jax.data.conversation.messages import check_messages, check_tools
from llada_jax.errors import InputError
from tests.helpers.data_helpers import CHATML, message, with_template

ARGUMENTS = {"city": "Paris"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}


def one(message):
    (checked,) = check_messages([message], "messages")
    return checked


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]},
        {"tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]},
        {"tool_calls": [{"name": "weather", "parameters": json.dumps(ARGUMENTS)}]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
        {"function_call": CALL["function"], "tool_calls": []},
        {"content": "", "function_call": CALL["function"], "tool_calls": None},
    ],
)
def test_calls_have_one_form(given):
    found = one({"role": "assistant", "content": None} | given)
    assert found["content"] == "" and "function_call" not in found
    (call,) = found["tool_calls"]
    assert call["function"]["name"] == "weather" and call["function"]["arguments"] == ARGUMENTS
    assert call["type"] == "function"


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_a_call_without_arguments(arguments):
    found = one({"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": arguments}}]})
    assert found["tool_calls"] == [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"type": "input_text", "text": "a", "image_url": None}], "a"),
        ([{"type": "output_text", "text": "a", "annotations": []}], "a"),
        ([], ""),
        ("a", "a"),
    ],
)
def test_text_parts_are_joined(content, text):
    assert one(message("user", content))["content"] == text


SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "u"},
    {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "a"},
]


@pytest.mark.parametrize("name", ["conversations", "conversation", "messages"])
def test_sharegpt(name):
    tokenizer = with_template(CHATML)
    turns = [
        message("system", "s"), message("user", "u"), message("assistant", None, tool_calls=[CALL]),
        message("tool", "sunny"), message("assistant", "a"),
    ]  # fmt: skip
    expected = chat.prepare({"messages": turns}, tokenizer)
    assert chat.prepare({name: SHAREGPT}, tokenizer) == chat.prepare({name: turns}, tokenizer) == expected
    assert chat.prepare({name: SHAREGPT[1:], "system": "s"}, tokenizer) == expected
    assert chat.prepare({name: json.dumps(SHAREGPT)}, tokenizer) == expected
    names = {"human": "user", "gpt": "assistant", "observation": "tool"}
    renamed = [turn | {"from": names.get(turn["from"], turn["from"])} for turn in SHAREGPT]
    assert chat.prepare({name: renamed}, tokenizer) == expected
    tools = [{"name": "weather", "description": "d"}]
    expected = chat.prepare({"messages": turns, "tools": tools}, tokenizer)
    assert chat.prepare({name: SHAREGPT, "tools": json.dumps(tools)}, tokenizer) == expected


@pytest.mark.parametrize(("on", "off"), [(1, 0), (True, False), (1.0, 0.0)])
@pytest.mark.parametrize("flag", ["weight", "train", "training", "trainable", "loss"])
@pytest.mark.parametrize("turns", ["all", "each"])
def test_a_turn_can_be_left_unsupervised(flag, on, off, turns):
    rows = [message("user", "u"), message("assistant", "a", **{flag: off}), message("user", "v", **{flag: off})]
    rows += [message("assistant", "b", **{flag: on}), message("user", "w"), message("assistant", "c", **{flag: off})]
    (document,) = chat.prepare({"messages": rows}, with_template(CHATML), turns)
    assert [document.text[slice(*span)] for span in document.spans] == ["b<|im_end|>"]
    assert flag not in document.text and document.text.endswith("b<|im_end|>")
    assert chat.prepare({"messages": rows}, with_template(CHATML), "last") == []


TEXT = {"type": "text", "text": "a"}
BAD = [
    ({"role": "user", "content": [TEXT, {"type": "image_url"}]}, "content[1] is of type 'image_url', only text"),
    ({"role": "user", "content": [{"type": "image"}]}, "content[0] is of type 'image', only text is read"),
    ({"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}, "content[0] is of type 'thinking'"),
    ({"role": "user", "content": {"text": "a"}}, "content is not a string"),
    ({"role": "user", "content": ["a"]}, "content is not a string"),
    ({"role": "tool"}, "content is not a string"),
    ({"role": "critic", "content": "a"}, "role 'critic' is none of system, developer"),
    ({"from": "narrator", "value": "a"}, "from 'narrator' is none of system, human"),
    ({"from": "human"}, "content is not a string"),
    ({"from": "function_call", "value": "weather()"}, "value is no JSON"),
    ({"role": "assistant", "content": "a", "weight": 0.5}, "weight 0.5 is neither 0 nor 1"),
    ({"role": "assistant", "content": "a", "train": "no"}, "train 'no' is neither 0 nor 1"),
    ({"role": "assistant", "content": "a", "train": True, "weight": 0}, "weight and train contradict"),
    ({"role": "user", "content": "a", "weight": 1}, "weight 1 asks for the user's turn to be supervised"),
    ({"role": "assistant", "content": "a", "mask": 1}, "mask cannot be honoured"),
    ({"role": "assistant", "content": "a", "prefix": True}, "prefix cannot be honoured"),
    ({"role": "user", "content": "a", "images": ["x.png"]}, "images cannot be honoured"),
    ({"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"}, "reasoning and thinking differ"),
    ({"role": "assistant", "content": "a", "reasoning_content": ["b"]}, "reasoning_content is not a string"),
    ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "tool_calls[0] has no name"),
    ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "tool_calls[0] has no name"),
    ({"role": "assistant", "tool_calls": "weather"}, "tool_calls is not a list of objects"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x=1"}]}, "'x=1' is a string that holds no JSON"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "holds no JSON object"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments is not an object"),
    ({"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "f"}}, "both function_call and tool_calls"),
]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_malformed_messages_are_named(bad, reason):
    with pytest.raises(InputError) as caught:
        check_messages([message("user", "a"), bad], "conversations")
    assert str(caught.value).startswith("conversations[1]") and reason in str(caught.value)


def test_remarks_and_what_says_nothing_are_ignored():
    remarks = {
        "id": 3,
        "name": "Ann",
        "timestamp": "now",
        "images": [],
        "prefix": False,
        "mask": 0,
        "function_call": None,
    }
    assert one(message("user", "a", **remarks))["content"] == "a"
    assert one({"role": "function", "name": "f", "content": "1"})["role"] == "tool"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "{"}, "tools is not JSON"),
        ({"tools": {"name": "f"}}, "tools is not a list of objects"),
        ({"tools": ["f"]}, "tools is not a list of objects"),
        ({"tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "both tools and functions"),
        ({"functions": 3}, "functions is not a list of objects"),
    ],
)
def test_malformed_tools_are_named(row, reason):
    with pytest.raises(InputError, match=reason):
        check_tools(row)
