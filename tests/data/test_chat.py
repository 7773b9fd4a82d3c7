import json

import numpy as np
import pytest

from llada_jax.data import chat
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.conversation.messages import check_messages
from llada_jax.data.records import parse_row
from llada_jax.errors import InputError
from llada_jax.interop.gguf import open_gguf, tokenizer_files
from llada_jax.tokenizer import from_files
from tests.helpers.data_helpers import CHATML, EOS, LING, message, with_template

# No end-of-turn marker, as a base model's template.
PLAIN = """
{%- for message in messages %}{{ '<role>' + message.role + '</role>' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<role>assistant</role>' }}{% endif %}"""
# Thoughts are shown in the last turn only.
REWRITES = """
{%- for m in messages %}{{ '<' + m.role + '>' }}
{{- m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


CALLS = [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}},
    {"type": "function", "function": {"name": "noop", "arguments": "{}"}},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TURNS = [
    message("system", "Be brief."),
    message("user", "Grüße? "),
    message("assistant", " Hallo,\nÄrger 🙂"),
    message("user", "1 + ?"),
    message("assistant", None, tool_calls=CALLS),
    message("tool", "1"),
    message("tool", "nothing"),
    message("assistant", "It is 1. "),
    message("user", "thanks"),
]
ANSWERS = {
    CHATML: [
        " Hallo,\nÄrger 🙂<|im_end|>",
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": null}}</tool_call>'
        '<tool_call>{"name": "noop", "arguments": {}}</tool_call><|im_end|>',
        "It is 1. <|im_end|>",
    ],
    LING: [
        " Hallo,\nÄrger 🙂<|role_end|>",
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": null}}\n</tool_call>'
        '\n<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call><|role_end|>',
        "It is 1. <|role_end|>",
    ],
}


def documents(row, tokenizer, turns="all"):
    """The documents of a row, given as a dict or as a line."""
    row = parse_row((row if isinstance(row, str) else json.dumps(row)).encode())
    return chat.tokenise(chat.prepare(row, tokenizer, turns), tokenizer)


def converse(row, tokenizer, turns="all"):
    (conversation,) = documents(row, tokenizer, turns)
    return conversation


def spoken(conversation, tokenizer):
    return [tokenizer.decode(conversation.ids[start:end]) for start, end in conversation.spans]


@pytest.mark.parametrize("template", [CHATML, LING])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_assistants_turns_and_their_end_markers_are_supervised(template, turns):
    tokenizer = with_template(template)
    conversation = converse({"messages": TURNS, "tools": TOOLS}, tokenizer, turns)
    assert spoken(conversation, tokenizer) == (ANSWERS[template] if turns == "all" else ANSWERS[template][-1:])
    whole = tokenizer.apply_chat_template(check_messages(TURNS, "messages"), False, tools=TOOLS)
    text = tokenizer.decode(conversation.ids)
    assert whole.startswith(text) and text.endswith(ANSWERS[template][-1])
    assert conversation.ids.dtype == np.int32
    assert (
        conversation.prompt_length
        == conversation.spans[0][0]
        == len(text.split(spoken(conversation, tokenizer)[0])[0].encode())
    )


def test_a_template_without_an_end_marker():
    tokenizer = with_template(PLAIN)
    row = {
        "messages": [
            message("user", "a"),
            message("assistant", "b \n"),
            message("user", "c"),
            message("assistant", "d\n"),
        ]
    }
    assert spoken(converse(row, tokenizer), tokenizer) == ["b \n", "d\n"]


def test_offsets_are_exact_where_the_tokenizer_trims_them():
    trims = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    row = {"messages": [message("user", "a  "), message("assistant", "  b  ")]}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = with_template(template, post_processor=trims)
    conversation = converse(row, tokenizer)
    assert conversation.spans == [(3, 8)]
    assert conversation.ids.tolist() == list(b"a    b  ")


def test_real_spans_of_smollm2(smollm2_gguf):
    tokenizer = from_files(tokenizer_files(open_gguf(smollm2_gguf)))
    turns = [m for m in TURNS if m["role"] != "tool" and m["content"]]
    conversation = converse({"messages": turns}, tokenizer)
    assert spoken(conversation, tokenizer) == [" Hallo,\nÄrger 🙂<|im_end|>", "It is 1. <|im_end|>"]
    assert conversation.ids.tolist() == tokenizer.encode(tokenizer.decode(conversation.ids))
    assert all(conversation.ids[end - 1] == tokenizer.eos_id for _, end in conversation.spans)
    # Without a system turn this template adds one of its own.
    conversation = converse({"messages": turns[1:3]}, tokenizer)
    assert spoken(conversation, tokenizer) == [" Hallo,\nÄrger 🙂<|im_end|>"]
    assert tokenizer.decode(conversation.ids).startswith("<|im_start|>system\nYou are")


@pytest.mark.parametrize("name", ["completion", "response", "output", "answer"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_texts_are_taken_as_they_are(name, template):
    found = converse({"prompt": "ab ", name: "ü", "messages": None}, with_template(template))
    assert found.ids.tolist() == [*"ab ü".encode(), EOS] and found.spans == [(3, 6)]


@pytest.mark.parametrize(
    ("mask", "spans"),
    [
        ({"prompt_length": 1}, [(1, 6)]),
        ({"prompt_lengths": 5}, [(5, 6)]),
        ({"labels": [-100, 2, 3, -100, EOS, -100]}, [(1, 3), (4, 5)]),
        ({"supervised": [True, False, False, True, True, True]}, [(0, 1), (3, 6)]),
        ({"supervised": [0, 1, 0, 0, 0, 0]}, [(1, 2)]),
    ],
)
def test_token_ids_with_what_of_them_is_supervised(mask, spans):
    """Tokens after the last supervised one are left out; a run of supervised tokens is a turn."""
    ids, tokenizer = [1, 2, 3, 4, EOS, 6], byte_tokenizer(EOS)
    row = {"input_ids": ids} | mask
    found = converse(row, tokenizer)
    assert found.ids.tolist() == ids[: spans[-1][1]] and found.spans == spans and found.ids.dtype == np.int32
    assert [document.spans for document in documents(row, tokenizer, "each")] == [[span] for span in spans]
    assert [len(document.ids) for document in documents(row, tokenizer, "each")] == [end for _, end in spans]
    assert converse(row, tokenizer, "last").spans == spans[-1:]


def test_a_completion_with_messages_is_rendered():
    """Whatever side the messages are on; only what the completion says is supervised."""
    tokenizer = with_template(CHATML)
    history = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    expected = converse({"messages": [*history, message("assistant", "d")]}, tokenizer, "last")
    for completion in ("d", [message("assistant", "d")]):
        found = converse({"prompt": history, "completion": completion}, tokenizer)
        assert found.ids.tolist() == expected.ids.tolist() and found.spans == expected.spans
    found = converse({"prompt": "c", "completion": [message("assistant", "d")]}, tokenizer)
    expected = converse({"messages": [message("user", "c"), message("assistant", "d")]}, tokenizer)
    assert found.ids.tolist() == expected.ids.tolist() and found.spans == expected.spans


def test_each_turn_is_a_document_of_its_own_after_all_before_it():
    tokenizer = with_template(LING)
    row = {"messages": TURNS, "tools": TOOLS}
    found = documents(row, tokenizer, "each")
    assert [spoken(document, tokenizer) for document in found] == [[answer] for answer in ANSWERS[LING]]
    whole = converse(row, tokenizer)
    for document, (start, end) in zip(found, whole.spans, strict=True):
        assert document.spans == [(start, end)] and document.ids.tolist() == whole.ids[:end].tolist()


def test_a_template_that_rewrites_earlier_turns():
    tokenizer = with_template(REWRITES)
    turns = [message("user", "a"), message("assistant", "<think>b</think>c")] * 2
    with pytest.raises(chat.TemplateError, match=r'rewrites earlier turns, seen at messages.1.; .* "each" or "last"'):
        documents({"messages": turns}, tokenizer)
    first, second = documents({"messages": turns}, tokenizer, "each")
    assert tokenizer.decode(first.ids) == "<user>a<assistant><think>b</think>c"
    assert tokenizer.decode(second.ids) == "<user>a<assistant>c<user>a<assistant><think>b</think>c"
    assert spoken(first, tokenizer) == spoken(second, tokenizer) == ["<think>b</think>c"]
    last = converse({"messages": turns}, tokenizer, "last")
    assert last.ids.tolist() == second.ids.tolist() and last.spans == second.spans


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [message("user", "a")]},
        {"messages": [message("user", "a"), message("assistant", "\n")]},
        {"messages": [message("user", "a"), {"role": "assistant"}]},
        {"prompt": "a", "response": ""},
        {"prompt": "a"},
        {"prompt": [message("user", "a")], "completion": []},
        {"prompt": [message("user", "a")], "completion": " "},
        {"input_ids": [1, 2], "prompt_length": 2},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [], "prompt_length": 0},
    ],
)
@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_rows_without_a_response(row, turns):
    assert documents(row, with_template(CHATML), turns) == []


MALFORMED = [
    ("{", "malformed JSON"),
    ("[1]", "not a JSON object"),
    ('{"text": "a"}', "neither messages, nor prompt and completion, nor input_ids"),
    ('{"messages": "a"}', "messages is not a list"),
    ('{"messages": ["a"]}', "messages[0] is not an object"),
    ('{"messages": [{"role": "human", "content": "a"}]}', "messages[0]: role 'human' is none of system, "),
    ('{"messages": [{"role": "user"}]}', "messages[0]: content is not a string"),
    ('{"messages": [{"role": "user", "content": ["a"]}]}', "messages[0]: content is not a string"),
    ('{"messages": [{"role": "user", "content": "a", "tool_calls": {}}]}', "messages[0]: tool_calls is not a list"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages[0] is the assistant's"),
    ('{"messages": [], "tools": "{"}', "tools is not JSON"),
    ('{"messages": [], "tools": "{}"}', "tools is not a list of objects"),
    ('{"messages": [{"role":"user","content":"\\ud800"},{"role":"assistant","content":"a"}]}', "lone surrogate"),
    ('{"response": "a"}', "prompt is missing"),
    ('{"prompt": "a", "response": 1}', "response is neither a string nor messages"),
    ('{"input_ids": [1.5], "prompt_length": 1}', "input_ids is not a list of token ids"),
    ('{"input_ids": [257], "prompt_length": 0}', "input_ids: the tokenizer has no token 257"),
    ('{"input_ids": [1], "prompt_length": true}', "prompt_length True is not a number of tokens"),
    ('{"input_ids": [1]}', "input_ids comes with nothing, expected one of labels, supervised, prompt_length"),
    ('{"input_ids": [1], "labels": [1], "prompt_length": 0}', "input_ids comes with labels and prompt_length"),
    ('{"input_ids": [1, 2], "labels": [-100]}', "labels is not a list of 2 entries"),
    ('{"input_ids": [1, 2], "labels": [2, -100]}', "labels holds something else than -100 and the token"),
    ('{"input_ids": [1, 2], "supervised": [true, 2]}', "supervised holds something else than true and false"),
    ('{"prompt": [{"role": "user", "content": "a"}], "completion": 1}', "completion is neither a string nor messages"),
    ('{"prompt": [], "completion": "a"}', "prompt is empty or ends with the assistant's turn"),
    ('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "answers the prompt with the user's turn"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_malformed_rows_are_named(line, reason):
    with pytest.raises(InputError) as caught:
        documents(line, with_template(CHATML))
    assert reason in str(caught.value) and not isinstance(caught.value, chat.TemplateError)
