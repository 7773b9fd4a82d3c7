"""Calls of tools in answers: parted from the text whatever its cuts, and told in OpenAI's form."""

import dataclasses
import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.checkpoint.weights import Model
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.model.config import preset
from llada_jax.sampling.batches.requests import Answer
from llada_jax.serving.events import Event
from llada_jax.serving.tool_calls import Call, Markers, Reader, markers_of
from llada_jax.tokenizer import from_files
from tests.serving.running import Scripted, served

# Earlier calls as Qwen's and Ling's templates write them.
TEMPLATE = """
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
Call one as <tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call>
{% endif %}
{%- for m in messages %}<role>{{ m.role }}</role>
{{- m.content }}
{%- for call in m.tool_calls %}
{%- if m.content or not loop.first %}{{ "\n" }}{% endif %}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}
{{- "}\n</tool_call>" }}
{%- endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<role>assistant</role>{% endif %}"""
CONFIG = preset("tiny")
MARKERS = Markers("<tool_call>", "</tool_call>")
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
HI = [{"role": "user", "content": "hi"}]


def written(name="weather", arguments='{"city": "Oslo"}', end="</tool_call>"):
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{end}'


def parted(text, cuts=(), markers=MARKERS):
    """(all text beside calls, all calls, what each feed gave) of a text that comes in parts."""
    reader, edges = Reader(markers), sorted({0, *cuts, len(text)})
    parts = [reader.feed(text[i:j]) for i, j in zip(edges, edges[1:], strict=False)] + [reader.end()]
    return "".join(part for part, _ in parts), [call for _, calls in parts for call in calls], parts


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("Hello.\n", "Hello.\n", []),
        (written(), "", [("weather", '{"city": "Oslo"}')]),
        (f"I look.\n{written()}\n{written('f', '{}')}\n", "I look.", [("weather", '{"city": "Oslo"}'), ("f", "{}")]),
        (f"\n\n{written()}\nDone. ", "\nDone. ", [("weather", '{"city": "Oslo"}')]),
        # The JSON text is the model's own.
        (written(arguments='{"x":1.00,  "é": "</tool_call>}\\""}'), "",
         [("weather", '{"x":1.00,  "é": "</tool_call>}\\""}')]),
        ('<tool_call>{"arguments" :{} , "name":"f"}</tool_call>', "", [("f", "{}")]),
        # A call that is none does not hide the next one.
        (f"<tool_call>x{written('f', '{}')}", "<tool_call>x", [("f", "{}")]),
        (f'<tool_call>{{"a": "{written("f", "{}")}', '<tool_call>{"a": "', [("f", "{}")]),
    ],
)  # fmt: skip
def test_calls_are_parted_from_the_text(text, content, calls):
    found, told, _ = parted(text)
    assert (found, told) == (content, [Call(i, *call) for i, call in enumerate(calls)])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", written()[:-1], written(end="</tool_cal!"), written(end="x</tool_call>"), written(arguments="3"),
        written(arguments='"{}"'), written(arguments="{,}"), written(arguments='{"a": NaN}'), written(name=" "),
        written(arguments='{}, "name": "g"'), written(arguments='{}, "id": 1'), written(arguments='{"a": ' * 9000),
        '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>["f"]</tool_call>', "<tool_call></tool_call>", "</tool_call> {} <tool_call", 'a <tool_call> {"a\\',
        '<tool_call>{"name": "f", "arguments": {"a": "two\nlines"}}</tool_call>',
    ],
)  # fmt: skip
def test_what_is_no_whole_call_stays_text_as_it_is(text):
    for piece in (text, f" a\n{text}\n b \n"):
        assert parted(piece)[:2] == (piece, [])
        assert parted(piece, random.Random(0).choices(range(len(piece)), k=9))[:2] == (piece, [])


PIECES = st.sampled_from((
    "<tool_call>", "</tool_call>", "<tool", "</", "<", "\n", " ", "é", "text", "{", "}", '"', "\\", '{"name": "f"',
    ', "arguments": {}', "}", written(), written("g", "{}"), written(arguments="{"), written()[:-3],
))  # fmt: skip


@given(st.lists(PIECES, max_size=10).map("".join), st.data())
def test_the_cuts_change_nothing_and_no_marker_leaks(text, data):
    content, calls, _ = parted(text)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert parted(text, cuts)[:2] == parted(text, range(len(text)))[:2] == (content, calls)
    if "<tool" not in content:
        given_out = [part for part, _ in parted(text, range(len(text)))[2]]
        assert not any("<tool" in part for part in given_out)
    kept = len(content) + sum(len(call.arguments) + len(call.name) for call in calls)
    assert kept <= len(text) and (calls or content == text)


def test_a_call_is_told_as_soon_as_it_is_whole_and_only_what_may_begin_one_is_held_back():
    text = f"I look. <toad> {written()} then"
    _, _, parts = parted(text, range(len(text)))
    at = next(i for i, (_, calls) in enumerate(parts) if calls)
    assert text[: at + 1].endswith("</tool_call>")
    assert "".join(part for part, _ in parts[: len("I look. <toad>")]) == "I look. <toad>"
    assert [part for part, _ in parts[-6:]] == ["", " t", "h", "e", "n", ""]


def tokenizer_with(template, special=(), ordinary=()):
    files = byte_tokenizer(CONFIG.eos_token_id, CONFIG.mask_token_id).files
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in ordinary])
    return from_files(files | {"tokenizer.json": backend.to_str().encode(), "chat_template.jinja": template.encode()})


def test_markers_are_those_of_the_checkpoints_own_template():
    assert markers_of(tokenizer_with(TEMPLATE)) == MARKERS
    names = ("<tool_call>", "</tool_call>")
    assert markers_of(tokenizer_with(TEMPLATE, ordinary=names)) == MARKERS
    special = dataclasses.replace(MARKERS, special=frozenset(names))
    assert markers_of(tokenizer_with(TEMPLATE, special=names)) == special
    other = TEMPLATE.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[/CALL]").replace('arguments"', 'args"')
    assert markers_of(tokenizer_with(other)) == Markers("[CALL]", "[/CALL]", "args")
    joined = TEMPLATE.replace("call.function.arguments | tojson", "raise_exception('text only')")
    assert markers_of(tokenizer_with(joined)) == MARKERS


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}<|end|>{% endfor %}",
        TEMPLATE.replace("<tool_call>\n", ""),  # what is before it begins the turn
        TEMPLATE.replace("\n</tool_call>", ""),  # what is behind it ends the turn
        TEMPLATE.replace('{"name": "', "").replace('", "arguments": ', " "),
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_writes_calls_in_another_way_has_no_markers(template):
    assert markers_of(tokenizer_with(template)) is None


@pytest.fixture(scope="module", params=["text", "added", "special"])
def server(request):
    """What it writes is told by `say`; its markers are text, added tokens or special ones."""
    names = ("<tool_call>", "</tool_call>")
    added = {"added": {"ordinary": names}, "special": {"special": names}}.get(request.param, {})
    with served(
        Model(CONFIG, {}, tokenizer_with(TEMPLATE, **added), {}), engine=Scripted(), max_length=2000
    ) as running:
        yield running


def say(server, text, cuts=(), end=True):
    ids = server.model.tokenizer.encode(text) + ([server.model.tokenizer.eos_id] if end else [])
    edges, events = sorted({0, *(cut for cut in cuts if cut < len(ids)), len(ids)}), []
    for i, j in zip(edges, edges[1:], strict=False):
        tokens = np.array(ids[i:j], np.int32)
        events.append(
            Event("block", tokens, np.zeros(j - i, np.int32), np.full(j - i, 0.5, np.float32), passes=(1, 1, 1))
        )
    tokens, empty = np.array(ids, np.int32), np.zeros(0, np.int32)
    server.engine.says = [
        *events,
        Event("done", answer=Answer(0, tokens, None, 1, 2, 0, 9, tokens, tokens, *[empty] * 3)),
    ]


def ask(server, messages=HI, **fields):
    return server.client.chat.completions.create(model="tiny", messages=messages, **{"tools": [TOOL]} | fields)


TEXT = f"I look.\n{written()}\n{written('f', '{}')}"


def streamed(server, **fields):
    """(content, [(id, name, arguments)], finish_reason) as a client puts a stream together; and all its chunks."""
    content, calls, reason, chunks = "", {}, None, list(ask(server, stream=True, **fields))
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.index == len(calls) and call.type == "function"
            calls[call.index] = (call.id, call.function.name, call.function.arguments)
        reason = choice.finish_reason or reason
    return content, list(calls.values()), reason, chunks


def test_openais_client_gets_the_calls(server):
    say(server, TEXT)
    (choice,) = ask(server).choices
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("weather", {"city": "Oslo"}), ("f", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    say(server, written())
    first, second = (ask(server).choices[0].message for _ in range(2))
    assert first.content is None and first.tool_calls[0].id != second.tool_calls[0].id


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"extra_body": {"provisional": True}}])
def test_a_stream_tells_the_same_wherever_its_blocks_end(server, fields):
    size = len(server.model.tokenizer.encode(TEXT))
    for cuts in ((), range(size), range(0, size, 7), (8, 9, 30)):
        say(server, TEXT, cuts)
        content, calls, reason, chunks = streamed(server, **fields)
        assert (content, reason) == ("I look.", "tool_calls")
        assert [call[1:] for call in calls] == [("weather", '{"city": "Oslo"}'), ("f", "{}")]
        if "logprobs" in fields:
            parts = [c.choices[0].logprobs.content for c in chunks if c.choices and c.choices[0].logprobs]
            assert sum(map(len, parts)) == size + 1


def test_without_tools_and_with_broken_calls_the_text_is_told_as_it_is(server, request):
    is_special = "special" in request.node.callspec.id
    shown = TEXT.replace("<tool_call>", "").replace("</tool_call>", "") if is_special else TEXT
    say(server, TEXT)
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        (choice,) = ask(server, **fields).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (shown, None, "stop")
        assert streamed(server, **fields)[:3] == (shown, [], "stop")
    broken = TEXT.replace('"}}', '"}')
    say(server, broken)
    content, calls, reason, _ = streamed(server)
    assert (content, reason) == (broken.removesuffix("\n" + written("f", "{}")), "tool_calls")
    assert [call[1:] for call in calls] == [("f", "{}")]
    say(server, written()[:-4], end=False)
    assert streamed(server)[:3] == (written()[:-4], [], "length")
    say(server, TEXT, end=False)
    assert ask(server).choices[0].finish_reason == "length" and len(streamed(server)[1]) == 2


def test_a_stop_text_ends_the_answer_behind_a_call_or_in_it(server):
    for cuts in ((), range(90)):
        say(server, written() + "END more", cuts)
        content, calls, reason, _ = streamed(server, stop=["END"])
        assert (content, len(calls), reason) == ("", 1, "tool_calls")
        say(server, written(), cuts)
        assert streamed(server, stop=["}}"])[:3] == (written().partition("}}")[0], [], "stop")


def test_calls_go_back_in_the_next_turn_as_they_were_written(server):
    """With arguments as JSON, as clients send them, or as an object."""
    say(server, TEXT)
    message = ask(server).choices[0].message.model_dump()
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in message["tool_calls"]]
    as_objects = json.loads(json.dumps(message))
    for call in as_objects["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    for said in (message, as_objects, {k: v for k, v in message.items() if v is not None}):
        ask(server, [*HI, said, *results])
        prompt = server.model.tokenizer.decode(server.engine.requests[-1][0].prompt)
        turns = f"<role>user</role>hi<|end|><role>assistant</role>{TEXT}<|end|>" + "<role>tool</role>rain<|end|>" * 2
        assert prompt.partition("</tool_call>\n")[2] == f"{turns}<role>assistant</role>"
