import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import chat, pack, pack_chat
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.order import Rows
from llada_jax.errors import InputError
from llada_jax.interop.gguf import open_gguf, tokenizer_files
from llada_jax.interop.tokenizer import from_files

ROOT = pathlib.Path(__file__).parent.parent
EOS = 256

CHATML = """
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LING = """
{{- '<role>SYSTEM</role>' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{%- if tools %}{{ '# Tools\\n<tools>' + (tools | tojson) + '</tools>' }}{% endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + message.content }}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|role_end|>' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<role>OBSERVATION</role>' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|role_end|>' }}{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""
# No end-of-turn marker, as a base model's template.
PLAIN = """
{%- for message in messages %}{{ '<role>' + message.role + '</role>' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<role>assistant</role>' }}{% endif %}"""
# Thoughts are shown in the last turn only.
REWRITES = """
{%- for m in messages %}{{ '<' + m.role + '>' }}
{{- m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
REJECTS = "{{ raise_exception('no') }}"


def with_template(template, **changes):
    files = byte_tokenizer(EOS).files
    files |= {"chat_template.jinja": template.encode()} if template else {}
    tokenizer = json.loads(files["tokenizer.json"]) | changes
    return from_files(files | {"tokenizer.json": json.dumps(tokenizer).encode()})


def message(role, content, **more):
    return {"role": role, "content": content} | more


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
        '<tool_call>{"name": "noop", "arguments": "{}"}</tool_call><|im_end|>',
        "It is 1. <|im_end|>",
    ],
    LING: [
        " Hallo,\nÄrger 🙂<|role_end|>",
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": null}}\n</tool_call>'
        '\n<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call><|role_end|>',
        "It is 1. <|role_end|>",
    ],
}


def converse(row, tokenizer, turns="all"):
    prepared = chat.prepare(chat.parse_row(row), tokenizer, turns)
    return None if prepared is None else chat.tokenise([prepared], tokenizer)[0]


def spoken(conversation, tokenizer):
    return [tokenizer.decode(conversation.ids[start:end]) for start, end in conversation.spans]


@pytest.mark.parametrize("template", [CHATML, LING])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_assistants_turns_and_their_end_markers_are_supervised(template, turns):
    tokenizer = with_template(template)
    conversation = converse({"messages": TURNS, "tools": TOOLS}, tokenizer, turns)
    assert spoken(conversation, tokenizer) == (ANSWERS[template] if turns == "all" else ANSWERS[template][-1:])
    whole = tokenizer.apply_chat_template([m | {"content": m["content"] or ""} for m in TURNS], False, tools=TOOLS)
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


def test_pairs_and_token_ids_need_no_template():
    tokenizer = byte_tokenizer(EOS)
    pair = converse({"prompt": "ab ", "response": "ü", "messages": None}, tokenizer)
    assert pair.ids.tolist() == [*"ab ü".encode(), EOS] and pair.spans == [(3, 6)]
    for name in ("prompt_length", "prompt_lengths"):
        ids = converse({"input_ids": [1, 2, EOS], name: 1}, tokenizer)
        assert ids.ids.tolist() == [1, 2, EOS] and ids.spans == [(1, 3)] and ids.ids.dtype == np.int32


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [message("user", "a")]},
        {"messages": [message("user", "a"), message("assistant", "\n")]},
        {"messages": [message("user", "a"), {"role": "assistant"}]},
        {"prompt": "a", "response": ""},
        {"prompt": "a"},
        {"input_ids": [1, 2], "prompt_length": 2},
        {"input_ids": [], "prompt_length": 0},
    ],
)
def test_rows_without_a_response(row):
    assert converse(row, with_template(CHATML)) is None


MALFORMED = [
    ("{", "malformed JSON"),
    ("[1]", "not a JSON object"),
    ('{"text": "a"}', "neither messages, nor prompt and response, nor input_ids"),
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
    ('{"prompt": "a", "response": 1}', "response is not a string"),
    ('{"input_ids": [1.5], "prompt_length": 1}', "input_ids is not a list of token ids"),
    ('{"input_ids": [257], "prompt_length": 0}', "input_ids: the tokenizer has no token 257"),
    ('{"input_ids": [1], "prompt_length": true}', "prompt_length True is not a number of tokens"),
    ('{"input_ids": [1]}', "prompt_length None is not a number of tokens"),
]


def test_malformed_rows_name_file_and_line_or_are_counted(tmp_path):
    tokenizer, file = with_template(CHATML), tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"})
    for line, reason in MALFORMED:
        file.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(InputError) as caught:
            pack_chat.pack_chat(str(file), tokenizer, str(tmp_path / "out"), 64)
        assert str(caught.value).startswith(f"{file}:3: ") and reason in str(caught.value)
        assert not (tmp_path / "out").exists()
    file.write_text("".join(f"{line}\n{good}\n" for line, _ in MALFORMED))
    dataset = pack_chat.pack_chat(str(file), tokenizer, str(tmp_path / "out"), 64, skip_malformed=True)
    assert dataset["unusable"] == {"no response": 0, "too long": 0, "malformed": len(MALFORMED)}
    assert dataset["used"] == dataset["documents"] == len(MALFORMED) == dataset["conversations"] / 2


def test_what_the_template_cannot_do_is_never_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    turns = [message("user", "a"), message("assistant", "<think>b</think>c")] * 2
    file.write_text(json.dumps({"messages": turns}) + "\n")
    arguments = {"length": 64, "skip_malformed": True}
    for template, reason in ((REWRITES, "the chat template rewrites earlier turns"), (None, "has no chat template")):
        with pytest.raises(InputError, match=f"{file}:1: .*{reason}"):
            pack_chat.pack_chat(str(file), with_template(template), str(tmp_path / "out"), **arguments)
    tokenizer = with_template(REWRITES)
    conversation = converse({"messages": turns}, tokenizer, "last")
    assert spoken(conversation, tokenizer) == ["<think>b</think>c"]
    assert tokenizer.decode(conversation.ids).startswith("<user>a<assistant>c<user>a")
    with pytest.raises(InputError, match=f"{file}:1: chat template: no"):
        pack_chat.pack_chat(str(file), with_template(REJECTS), str(tmp_path / "out"), 64)
    with pytest.raises(InputError, match=r"none of 1 conversations is usable \(malformed: 1\)"):
        pack_chat.pack_chat(str(file), with_template(REJECTS), str(tmp_path / "out"), **arguments)


LENGTH, ALIGN = 64, 8


@pytest.fixture
def source(tmp_path):
    """Pairs and conversations of many lengths; some have no response, and some are longer than a row."""
    folder, random = tmp_path / "source", np.random.default_rng(0)
    folder.mkdir()
    lengths = [*range(1, 12), 55, 61, 62, 63, 64, *random.integers(1, 80, 60).tolist()]
    lines = [{"prompt": "p", "response": "é" * (n // 2) + "r" * (n % 2)} for n in lengths]
    lines[5:5] = [{"prompt": "p", "response": ""}, {"messages": [message("user", "a"), message("assistant", "b")]}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [[1, 2, 3, 4], [5] * LENGTH, [6] * (LENGTH + 1), [7]]
    table = {"input_ids": ids, "prompt_lengths": [1, LENGTH - 1, 0, 1], "ignored": ["x"] * 4}
    pq.write_table(pa.table(table), folder / "b.parquet", row_group_size=2)
    return folder


def read_back(out):
    opened = Rows(str(out), seed=0, shuffle=False)
    return [opened.at(i)[0] for i in range(len(opened))]


def expected(source, tokenizer):
    """{source: conversation} of those that are usable, and the counts of the others."""
    used, unusable = {}, {"no response": 0, "too long": 0, "malformed": 0}
    for file, offset, row in chat.read_rows(chat.list_files(str(source))):
        conversation = converse(row, tokenizer)
        if conversation is None or len(conversation.ids) > LENGTH:
            unusable["no response" if conversation is None else "too long"] += 1
        else:
            used[file, offset] = conversation
    return used, unusable


@pytest.mark.parametrize("tail", ["all", "none", 0, 3])
def test_conversations_are_packed_whole_with_their_tails(tmp_path, source, tail):
    tokenizer = with_template(CHATML)
    arguments = {"tail": tail, "block_align": ALIGN, "rows_per_shard": 9}
    dataset = pack_chat.pack_chat(str(source), tokenizer, str(tmp_path / "out"), LENGTH, **arguments)
    used, unusable = expected(source, tokenizer)
    found = {}
    rows = read_back(tmp_path / "out")
    for row in rows:
        assert row.ids.shape == (LENGTH,) and row.segment_ids.max() == len(row.sources)
        for segment, where in enumerate(row.sources, 1):
            assert where not in found
            positions = np.flatnonzero(row.segment_ids == segment)
            conversation = used[where]
            count = len(conversation.ids)
            rounded = count + -count % ALIGN
            assert positions[0] % ALIGN == 0
            assert positions.tolist() == list(
                range(positions[0], positions[0] + (count if tail == "none" else rounded))
            )
            ids, supervised = (x[positions[0] : positions[0] + rounded] for x in (row.ids, row.supervised))
            assert ids[:count].tolist() == conversation.ids.tolist() and (ids[count:] == EOS).all()
            tail_supervised = {"all": rounded, "none": 0}.get(tail, tail)
            spans = [*conversation.spans, (count, min(rounded, count + tail_supervised))]
            assert np.flatnonzero(supervised).tolist() == [i for span in spans for i in range(*span)]
            found[where] = True
        assert not row.supervised[row.segment_ids == 0].any() and (row.ids[row.segment_ids == 0] == EOS).all()
    assert found.keys() == used.keys()
    assert dataset["unusable"] == unusable and min(unusable["no response"], unusable["too long"]) >= 2
    assert dataset["used"] == dataset["documents"] == len(used) == dataset["conversations"] - sum(unusable.values())
    assert dataset["tokens"] == sum((row.segment_ids > 0).sum() for row in rows)
    assert dataset["supervised_tokens"] == sum(row.supervised.sum() for row in rows)
    assert [count for _, count in dataset["shards"]][:-1] == [9] * (len(dataset["shards"]) - 1)
    if tail == "all":  # rows are well filled
        assert dataset["rows"] <= 1.25 * dataset["tokens"] / LENGTH


def test_at_most_sixteen_rows_are_open(tmp_path):
    """Conversations of 5 blocks of 8 go to rows of their own; those of 3 fill the rows that are still open."""
    tokenizer, file = byte_tokenizer(EOS), tmp_path / "a.jsonl"
    lines = [{"input_ids": [i] * (40 if i < 18 else 24), "prompt_length": 1} for i in range(36)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pack_chat.pack_chat(str(file), tokenizer, str(tmp_path / "out"), LENGTH, block_align=ALIGN)
    first_tokens = [row.ids[[0, 40]].tolist() for row in read_back(tmp_path / "out")]
    assert first_tokens == [[0, EOS], [1, EOS], *([i, 16 + i] for i in range(2, 18)), [34, 35]]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rows_per_shard", [4, 20])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, source, monkeypatch, rows_per_shard):
    tokenizer = with_template(CHATML)
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 5)

    def run(out):
        shape = {"block_align": ALIGN, "rows_per_shard": rows_per_shard}
        pack_chat.pack_chat(str(source), tokenizer, str(out), LENGTH, **shape)
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "progress.json"}

    whole, replace, kills = run(tmp_path / "whole"), os.replace, 0
    for point in range(100):
        calls = 0

        def die(old, new, point=point):
            nonlocal calls
            calls += 1
            if calls == point // 2 + 1:
                if point % 2:
                    replace(old, new)
                raise Killed
            replace(old, new)

        monkeypatch.setattr(os, "replace", die)
        try:
            run(tmp_path / str(point))
        except Killed:
            kills += 1
        else:
            break
        monkeypatch.setattr(os, "replace", replace)
        assert run(tmp_path / str(point)) == whole
    assert kills >= 4 * len(json.loads(whole["dataset.json"])["shards"]) >= 8


def test_settings_are_checked(tmp_path, source):
    tokenizer = with_template(CHATML)
    arguments = {"source": str(source), "tokenizer": tokenizer, "out": str(tmp_path / "out"), "length": LENGTH}
    dataset = pack_chat.pack_chat(**arguments)
    assert pack_chat.pack_chat(**arguments) == json.loads(json.dumps(dataset))
    for changes, message in (
        ({"turns": "last"}, "turns is 'all' there but 'last' now"),
        ({"tail": 3}, "tail is 'all' there but 3 now"),
        ({"skip_malformed": True}, "skip_malformed is False there but True now"),
        ({"turns": "first"}, "turns 'first'"),
        ({"tail": "some"}, "tail 'some'"),
        ({"tail": -1}, "tail -1"),
        ({"block_align": 48}, "block_align 48 must"),
        ({"tokenizer": dataclasses.replace(tokenizer, special_tokens={})}, "no end-of-sequence token"),
    ):
        with pytest.raises(InputError) as caught:
            pack_chat.pack_chat(**(arguments | changes))
        assert message in str(caught.value)
    with pytest.raises(InputError, match="field is None there but 'text' now"):
        pack.pack(str(source / "a.jsonl"), tokenizer, str(tmp_path / "out"), LENGTH, block_align=32)
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(InputError, match="c.jsonl: empty dataset, no conversation"):
        pack_chat.pack_chat(str(tmp_path / "c.jsonl"), tokenizer, str(tmp_path / "new"), LENGTH)
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(InputError, match="d.txt: empty dataset, no file matches"):
        chat.list_files(str(tmp_path / "d.txt"))


def test_parquet_rows_are_those_of_jsonl(tmp_path):
    """A struct has all the keys of all rows in parquet: absent ones must not reach the template as None."""
    tokenizer = with_template(LING)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [message("user", "x"), message("assistant", None, tool_calls=calls), message("tool", "1")]
    rows = [
        {"messages": [*turns, message("assistant", "y")], "tools": json.dumps(TOOLS)},
        {"messages": [message("user", "x"), message("assistant", "z")]},
        {"messages": [message("human", "x")]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for (file, offset, row), expected_row in zip(
        chat.read_rows(chat.list_files(str(tmp_path))), rows[:2], strict=False
    ):
        assert (file, offset) == (0, rows.index(expected_row))
        found, wanted = converse(row, tokenizer), converse(expected_row, tokenizer)
        assert found.ids.tolist() == wanted.ids.tolist() and found.spans == wanted.spans
        assert "None" not in tokenizer.decode(found.ids)
    with pytest.raises(InputError, match="a.parquet:row 2: messages.0.: role 'human'"):
        pack_chat.pack_chat(str(tmp_path), tokenizer, str(tmp_path / "out"), 512)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet: none of the columns messages"):
        pack_chat.pack_chat(str(tmp_path), tokenizer, str(tmp_path / "out"), 512)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="a.parquet: unreadable parquet file"):
        pack_chat.pack_chat(str(tmp_path), tokenizer, str(tmp_path / "out"), 512)


def run_tool(folder, tokenizer, *arguments):
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, str(ROOT / "tools" / "pack_data.py"), f"--tokenizer={folder}", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_tool_packs_conversations_and_reports_the_unusable(tmp_path, source):
    arguments = [f"--source={source}", f"--out={tmp_path / 'out'}", f"--length={LENGTH}", "--kind=chat"]
    tokenizer = with_template(CHATML)
    with (source / "a.jsonl").open("a") as stream:
        stream.write("broken\n")
    result = run_tool(tmp_path / "tokenizer", tokenizer, *arguments)
    line = (source / "a.jsonl").read_bytes().count(b"\n")
    assert result.returncode == 2
    assert result.stderr == f"error: {source / 'a.jsonl'}:{line}: malformed JSON (Expecting value)\n"
    options = ["--skip_malformed", "--tail=2", "--turns=last", "--block_align=8"]
    result = run_tool(tmp_path / "tokenizer", tokenizer, *arguments, *options)
    assert result.returncode == 0, result.stderr
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (dataset["tail"], dataset["turns"], dataset["block_align"]) == (2, "last", 8)
    used, unusable = dataset["used"], dataset["unusable"]
    summary = result.stdout.splitlines()[-1]
    assert summary.startswith(f"{dataset['rows']} rows, {dataset['tokens']} tokens, {used} documents, 1 shards, ")
    assert summary.endswith(
        f", {dataset['supervised_tokens']} supervised tokens, {used} of {dataset['conversations']} conversations used "
        f"(unusable: {unusable['no response']} no response, {unusable['too long']} too long, 1 malformed)"
    )


def test_the_tool_refuses_flags_of_the_other_kind(tmp_path, source):
    arguments = [f"--source={source}", f"--out={tmp_path / 'out'}", f"--length={LENGTH}"]
    for extra, message in ((["--turns=last"], "--turns is for --kind=chat"), (["--kind=chat", "--tail=x"], "tail 'x'")):
        result = run_tool(tmp_path / "tokenizer", with_template(CHATML), *arguments, *extra)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
