import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import chat
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError
from tests.helpers.data_helpers import CHATML, EOS, message, with_template, write_rows

TEMPLATED, BARE = with_template(CHATML), with_template(None)
U, A = message("user", "u"), message("assistant", "a")
TURNS = [U, A]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def texts(row, tokenizer=TEMPLATED, turns="all"):
    """[(text, [supervised texts])] of the documents."""
    found = []
    for document in chat.prepare(row, tokenizer, turns):
        if isinstance(document, chat.Conversation):
            text = tokenizer.decode(document.ids)
            spans = [tokenizer.decode(document.ids[start:end]) for start, end in document.spans]
        else:
            text, spans = document.text, [document.text[start:end] for start, end in document.spans]
        found.append((text, spans))
    return found


def conversation(*turns):
    return texts({"messages": [message(role, text) for role, text in turns]})


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "u", "output": "a"}, [("user", "u")]),
        ({"instruction": "u", "input": "", "output": "a"}, [("user", "u")]),
        ({"instruction": "u", "input": "1 2", "output": "a"}, [("user", "u\n1 2")]),
        ({"instruction": "u", "context": "1 2", "response": "a", "category": "qa"}, [("user", "u\n1 2")]),
        ({"instruction": "u", "output": "a", "system": "s"}, [("system", "s"), ("user", "u")]),
        ({"system_prompt": "s", "question": "u", "response": "a"}, [("system", "s"), ("user", "u")]),
        ({"system_prompt": "", "question": "u", "answer": "a"}, [("user", "u")]),
        ({"query": "u", "response": "a"}, [("user", "u")]),
        ({"system": "s", "prompt": "u", "completion": "a"}, [("system", "s"), ("user", "u")]),
        ({"system": "s", "prompt": [U], "completion": [A]}, [("system", "s"), ("user", "u")]),
        ({"system": "s", "prompt": [message("system", " s"), U], "response": "a"}, [("system", " s"), ("user", "u")]),
        ({"system": "s", "messages": TURNS}, [("system", "s"), ("user", "u")]),
        ({"prompt": "u", "completion": {"role": "assistant", "content": "a"}}, [("user", "u")]),
        ({"messages": TURNS, "prompt": "x", "completion": "y"}, [("user", "u")]),
        ({"instruction": "u", "input": "1 2", "output": "a", "prompt": "Below: u 1 2"}, [("user", "u\n1 2")]),
    ],
)
def test_rows_of_a_question_and_an_answer(row, turns):
    assert texts(row) == conversation(*turns, ("assistant", "a"))
    with pytest.raises(chat.TemplateError, match="has no chat template"):
        texts(row, BARE)


@pytest.mark.parametrize("history", [[["b", "c"]], [message("user", "b"), message("assistant", "c")]])
def test_history_is_said_before_the_instruction(history):
    expected = conversation(("system", "s"), ("user", "b"), ("assistant", "c"), ("user", "u"), ("assistant", "a"))
    assert texts({"instruction": "u", "output": "a", "history": history, "system": "s"}) == expected
    assert texts({"prompt": "u", "completion": "a", "history": history, "system": "s"})[0][1] == ["a<|im_end|>"]


def test_what_a_prompt_repeats_is_a_remark():
    row = {"prompt": "Read: 1  2\n", "context": "1 2", "completion": "a", "input": " "}
    assert texts(row) == texts({"prompt": row["prompt"], "completion": "a"})
    assert texts({"messages": TURNS, "label": False, "context": "x", "input": "y"}) == texts({"messages": TURNS})


def test_texts_with_tools_are_a_conversation():
    assert texts({"prompt": "u", "completion": "a", "tools": TOOLS}) == texts({"messages": TURNS, "tools": TOOLS})
    assert texts({"prompt": "u", "completion": "a", "tools": []}) == [
        ("ua" + BARE.id_to_token(EOS), ["a" + BARE.id_to_token(EOS)])
    ]


def test_variables_of_the_template():
    tokenizer = with_template("{% if not thinking %}{{ '/no_think' }}{% endif %}" + CHATML)
    assert texts({"messages": TURNS}, tokenizer)[0][0].startswith("/no_think")
    for variables in ({"thinking": True}, '{"thinking": true}'):
        row = {"messages": TURNS, "chat_template_kwargs": variables}
        assert texts(row, tokenizer) == texts({"messages": TURNS})
        assert chat.prompt(row | {"messages": [U]}, tokenizer).text == chat.prompt({"messages": [U]}, TEMPLATED).text


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_a_row_of_no_weight_is_not_learnt(weight):
    assert (
        texts({"messages": TURNS, "weight": weight}) == texts({"prompt": "u", "response": "a", "weight": weight}) == []
    )
    assert texts({"messages": TURNS, "weight": 1, "id": 7, "source": "web", "label": 2}) == texts({"messages": TURNS})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a", "id": 1}, "nor instruction and output; the row has text, id"),
        ({}, "the row has nothing"),
        ({"output": "a", "labels": [1]}, "nor instruction and output; the row has output, labels"),
        ({"instruction": "u"}, "output is missing"),
        ({"instruction": 3, "output": "a"}, "instruction is not a string"),
        ({"instruction": "u", "input": [1], "output": "a"}, "input is not a string"),
        ({"messages": TURNS, "images": ["a.png"]}, "images cannot be honoured"),
        ({"messages": TURNS, "mask": "User"}, "mask cannot be honoured"),
        ({"messages": TURNS, "train_on_inputs": True}, "train_on_inputs cannot be honoured"),
        ({"messages": TURNS, "loss_mask": [0, 1]}, "loss_mask says something of tokens, but there are no input_ids"),
        ({"prompt": "u", "completion": "a", "completion_mask": [0, 1]}, "completion_mask says something of tokens"),
        ({"prompt": "u", "completion": "a", "label": False}, "label is false: an answer to avoid"),
        ({"prompt": "u", "input": "1 2", "completion": "a"}, "input is not in the prompt beside it"),
        ({"prompt": "u", "context": "1 2", "response": "a"}, "context is not in the prompt beside it"),
        ({"messages": TURNS, "weight": 2}, "weight 2 is neither 0 nor 1"),
        ({"messages": TURNS, "sample_weight": "high"}, "sample_weight 'high' is neither 0 nor 1"),
        ({"messages": [message("system", "s"), *TURNS], "system": "t"}, "system is not what the system says"),
        ({"messages": TURNS, "system": ["s"]}, "system is not a string"),
        ({"messages": TURNS, "history": [["a", "b"]]}, "both history and messages"),
        ({"instruction": "u", "output": "a", "history": [["b"]]}, "history[0] is not what the user and what"),
        ({"messages": TURNS, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs cannot set tools"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
    ],
)
def test_what_cannot_be_read_or_honoured_is_named(row, reason):
    with pytest.raises(InputError) as caught:
        texts(row)
    assert reason in str(caught.value)


ROWS = [
    {"instruction": "u", "output": "a", "system": "s", "weight": 1, "id": 1},
    {"instruction": "v", "output": "b", "system": None, "weight": 0, "id": 2},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_of_tables_and_lines_are_read_alike(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_rows(path, ROWS) if suffix == "jsonl" else pq.write_table(pa.Table.from_pylist(ROWS), path)
    dataset = pack_chat(str(path), TEMPLATED, str(tmp_path / "out"), 96)
    assert dataset["conversations"] == 2 and dataset["unusable"]["no response"] == 1
    path = tmp_path / f"b.{suffix}"
    rows = [row | {"images": ["x.png"]} for row in ROWS]
    write_rows(path, rows) if suffix == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match=r"b\.(jsonl:1|parquet:row 0): images cannot be honoured"):
        pack_chat(str(path), TEMPLATED, str(tmp_path / "out2"), 96)


def test_what_a_template_leaves_out_is_counted_when_asked_for(tmp_path):
    drops = with_template("{% for m in messages if m.role != 'system' %}{{ m.role + m.content }}{% endfor %}")
    path = write_rows(
        tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": [message("system", "Be brief."), *TURNS]}]
    )
    with pytest.raises(InputError, match=f"^{path}:2: the chat template leaves out what messages.0..content says"):
        pack_chat(path, drops, str(tmp_path / "out"), 64)
    assert not (tmp_path / "out").exists()
    assert pack_chat(path, drops, str(tmp_path / "out"), 64, skip_malformed=True)["unusable"]["malformed"] == 1


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "u"}, "u"),
        ({"prompt": " \n"}, " \n"),
        ({"prompt": [U]}, conversation(("user", "u"), ("assistant", "a"))[0][0].removesuffix("a<|im_end|>")),
    ],
)
def test_prompts(row, text):
    assert chat.prompt(row, TEMPLATED).text == text


def test_every_way_to_ask_gives_one_prompt():
    expected = chat.prompt({"messages": [message("system", "s"), U], "tools": TOOLS}, TEMPLATED).text
    for row in (
        {"messages": [U], "system": "s"},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}]},
        {"prompt": "u", "system": "s"},
        {"messages": [message("system", "s"), message("user", [{"type": "text", "text": "u"}])]},
        {"messages": json.dumps([message("system", "s"), U])},
    ):
        assert chat.prompt(row | {"tools": TOOLS, "id": 3}, TEMPLATED).text == expected
    assert chat.prompt({"prompt": "u"}, TEMPLATED, chat=True).text == chat.prompt({"messages": [U]}, TEMPLATED).text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "prompt is empty: there is nothing to continue"),
        ({"prompt": []}, "prompt is empty or ends with the assistant's turn"),
        ({"messages": []}, "prompt is empty or ends with the assistant's turn"),
        ({"messages": TURNS}, "ends with the assistant's turn, so that there is nothing to answer"),
        ({"messages": [message("user", " ")]}, "prompt is empty: the user says nothing"),
        ({"prompt": "u", "messages": [U]}, 'expected "prompt" (text) or "messages" (list); the row has prompt, mess'),
        ({"question": "u"}, 'expected "prompt" (text) or "messages" (list); the row has question'),
        ({"prompt": "u", "input": "1 2"}, "input is not in the prompt beside it"),
        ({"messages": [U], "images": ["x.png"]}, "images cannot be honoured"),
        ({"prompt": 3}, "prompt is neither a string nor messages"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content is not a string"),
        ({"messages": [U], "tools": "x"}, "tools is not JSON"),
    ],
)
def test_prompts_that_cannot_be_answered(row, reason):
    with pytest.raises(InputError) as caught:
        chat.prompt(row, TEMPLATED)
    assert reason in str(caught.value)
