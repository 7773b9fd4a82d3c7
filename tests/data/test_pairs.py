import json

import pytest

from llada_jax.data import chat, pairs
from llada_jax.data.records import parse_row
from llada_jax.errors import InputError
from tests.helpers.data_helpers import CHATML, EOS, message, with_template

USER, ASSISTANT = message("user", "2+2="), message("assistant", "4")
WRONG = message("assistant", "five")


def said(row, tokenizer):
    """[(prompt, supervised answer), ...] of the chosen and the rejected document, as texts; or the reason."""
    found = pairs.prepare(parse_row(row.encode() if isinstance(row, str) else json.dumps(row).encode()), tokenizer)
    if isinstance(found, str):
        return found
    texts = []
    for document in chat.tokenise(found, tokenizer):
        ((start, end),) = document.spans
        assert end == len(document.ids)
        texts.append((tokenizer.decode(document.ids[:start]), tokenizer.decode(document.ids[start:])))
    return texts


RENDERED = [
    ("<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>") for answer in ("4", "five")
]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
        {"prompt": [USER], "chosen": "4", "rejected": "five"},
        {"prompt": "2+2=", "chosen": [ASSISTANT], "rejected": [WRONG]},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WRONG]},
        {"prompt": "2+2=", "chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]},
        {"prompt": None, "chosen": [USER, ASSISTANT, message("user", "thanks")], "rejected": [USER, WRONG]},
    ],
)
def test_every_form_of_a_pair_is_rendered_the_same(row):
    assert said(row, with_template(CHATML)) == RENDERED


def test_what_the_answers_have_in_common_is_prompt():
    history = [USER, ASSISTANT, message("user", "sure?")]
    yes, no = message("assistant", "yes"), message("assistant", "no")
    (prompt, chosen), (same, rejected) = said({"chosen": [*history, yes], "rejected": [*history, no]}, TEMPLATED)
    assert prompt == same == TEMPLATED.apply_chat_template(history)
    assert (chosen, rejected) == ("yes<|im_end|>", "no<|im_end|>")


def test_an_answer_of_several_turns_is_supervised_but_for_the_tool():
    call = message("assistant", None, tool_calls=[{"function": {"name": "add", "arguments": {}}}])
    row = {"prompt": [USER], "chosen": [call, message("tool", "4"), ASSISTANT], "rejected": "5"}
    chosen, rejected = chat.tokenise(pairs.prepare(row | {"tools": []}, TEMPLATED), TEMPLATED)
    assert len(chosen.spans) == 2 and len(rejected.spans) == 1
    assert TEMPLATED.decode(chosen.ids[slice(*chosen.spans[1])]) == "4<|im_end|>"


TEMPLATED, BARE = with_template(CHATML), with_template(None)
END = BARE.id_to_token(EOS)


@pytest.mark.parametrize(
    ("row", "tokenizer", "prompt", "answers"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "five"}, BARE, "2+2=", ["4", "five"]),
        (
            {"chosen": "H: hi\n\nA: no", "rejected": "H: hi\n\nA: nothing"},
            TEMPLATED,
            "H: hi\n\nA:",
            [" no", " nothing"],
        ),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: I can", "rejected": "\n\nHuman: hi\n\nAssistant: I will not"},
            TEMPLATED,
            "\n\nHuman: hi\n\nAssistant:",
            [" I can", " I will not"],
        ),
        (
            {
                "chosen": "### Instruction:\nadd\n### Response:\n4",
                "rejected": "### Instruction:\nadd\n### Response:\n5",
            },
            BARE,
            "### Instruction:\nadd\n### Response:",
            ["\n4", "\n5"],
        ),
        ({"chosen": "[INST] a [/INST] b", "rejected": "[INST] a [/INST] c"}, BARE, "[INST] a [/INST]", [" b", " c"]),
    ],
)
def test_texts_without_a_template(row, tokenizer, prompt, answers):
    assert said(row, tokenizer) == [(prompt, answer + END) for answer in answers]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Four.", "It might be five."),
        ("The capital is Paris.", "The capital is Rome."),
        ("the sky is blue", "the sky is black"),
        ("a \n b", "a \n c"),
        ("yes", "yesterday"),
        ("Note: it is 4", "Note: it is 5"),
        ("Answer: 4", "Answer: 5"),
        ("Let me think.\nAnswer: 4", "Let me think.\nAnswer: 5"),
        ("\n\nHuman: hi\n\nAssistant: a\n\nHuman: b", "\n\nHuman: hi\n\nAssistant: a\n\nHuman: c"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"prompt": ""}, {"question": " "}, {"messages": ""}, {"id": "q7"}])
def test_what_two_answers_happen_to_begin_with_is_no_prompt(chosen, rejected, more):
    for tokenizer in (TEMPLATED, BARE):
        with pytest.raises(InputError, match="prompt is (missing|empty)|messages is not a list"):
            said({"chosen": chosen, "rejected": rejected} | more, tokenizer)


ANSWERS = {"chosen": "4", "rejected": "five"}


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"question": "2+2="}, ""),
        ({"input": "2+2="}, ""),
        ({"instruction": "2+2=", "input": ""}, ""),
        ({"query": "2+2=", "system": " "}, ""),
        ({"system": "Be brief.", "question": "2+2="}, "Be brief."),
        ({"system": "Be brief.", "input": "2+2="}, "Be brief."),
        ({"system_prompt": "Be brief.", "prompt": "2+2="}, "Be brief."),
        ({"system": "Be brief.", "prompt": [USER]}, "Be brief."),
        ({"system": "Be brief.", "prompt": [message("system", "Be brief."), USER]}, "Be brief."),
        ({"messages": [USER]}, ""),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2="}]},
            "Be brief.",
        ),
    ],
)
def test_a_prompt_of_any_name_and_the_system_turn(row, system):
    system = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    expected = [(system + prompt, answer) for prompt, answer in RENDERED]
    assert said(row | ANSWERS, TEMPLATED) == expected
    turns = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"role": "assistant", "content": "five"}}
    assert said(row | turns, TEMPLATED) == expected


def test_an_instruction_and_its_input_and_history_are_prompt():
    (prompt, _), _ = said({"instruction": "Add.", "input": "2 2", "history": [["hi", "yo"]]} | ANSWERS, TEMPLATED)
    turns = [message("user", "hi"), message("assistant", "yo"), message("user", "Add.\n2 2")]
    assert prompt == TEMPLATED.apply_chat_template(turns)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical answers"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "identical answers"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER]}, "identical answers"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "no response"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 0}, "no response"),
        ({"prompt": "a", "chosen": [], "rejected": [ASSISTANT]}, "no response"),
        ({"chosen": [USER], "rejected": [USER, ASSISTANT]}, "no response"),
    ],
)
def test_pairs_that_cannot_be_used(row, reason):
    assert said(row, TEMPLATED) == reason


def test_texts_that_cannot_be_used():
    assert said({"prompt": "a", "chosen": "b", "rejected": "b"}, BARE) == "identical answers"
    assert said({"chosen": "b", "rejected": "b"}, BARE) == "identical answers"
    assert said({"prompt": "a", "chosen": "", "rejected": "b"}, BARE) == "no response"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a", "chosen": "b"}', "rejected is missing; the row has prompt, chosen"),
        ({"prompt": "a", "input": "x", "chosen": "b", "rejected": "c"}, "input is not in the prompt beside it"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "weight": 0.5}', "weight 0.5 is neither 0 nor 1"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}', "images cannot be honoured"),
        ({"system": "a", "prompt": [message("system", "b"), USER]} | ANSWERS, "system is not what the system says"),
        ('{"prompt": "a", "rejected": "b"}', "chosen is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": 1}', "rejected is neither a string nor messages"),
        ('{"prompt": {}, "chosen": "b", "rejected": "c"}', "prompt is neither a string nor messages"),
        ('{"prompt": "a", "chosen": [1], "rejected": "c"}', "chosen[0] is not an object"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "prompt is empty or ends with the assistant's turn"),
        ({"chosen": [ASSISTANT], "rejected": [WRONG]}, "prompt is empty or ends with the assistant's turn"),
        ({"prompt": [USER, ASSISTANT], "chosen": "b", "rejected": "c"}, "ends with the assistant's turn"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [message("user", "?"), ASSISTANT]},
            "prompt is empty or ends with",
        ),
        (
            {"prompt": "hello", "chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]},
            "chosen answers the prompt with the user's turn",
        ),
        ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "lone surrogate"),
    ],
)
def test_malformed_pairs_are_named(row, reason):
    for tokenizer in (TEMPLATED, BARE):
        with pytest.raises(InputError) as caught:
            said(row, tokenizer)
        assert reason in str(caught.value)


def test_messages_need_a_template():
    with pytest.raises(chat.TemplateError, match="has no chat template"):
        said({"chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]}, BARE)
