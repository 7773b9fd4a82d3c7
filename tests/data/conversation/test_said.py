"""What a template leaves out is refused, what it only writes in another way is not."""

import json

import pytest

from llada_jax.data import chat
from llada_jax.errors import InputError
from tests.helpers.data_helpers import CHATML, LING, message, with_template

NAMES_ONLY = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Qwen3's way: reasoning of turns before the last question is not shown; a tag inside the content counts as well.
QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% set content = m.content %}{% set reasoning = '' %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Llama 3's way: what the tool says is JSON; one call a turn.
LLAMA = """
{%- if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}{{ '<h>assistant</h>' }}{% set f = m.tool_calls[0].function %}
{{- '{"name": "' + f.name + '", "parameters": ' }}{{ f.arguments | tojson }}{{ '}<eot>' }}
{%- elif m.role == 'tool' %}{{ '<h>ipython</h>' + (m.content | tojson) + '<eot>' }}
{%- else %}{{ '<h>' + m.role + '</h>' + (m.content | trim) + '<eot>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<h>assistant</h>' }}{% endif %}"""
# DeepSeek's way: arguments are joined to other texts.
JOINS = """
{%- for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}
{{- '<call>' + c.type + ':' + c.function.name + '```json' + c.function.arguments + '```' }}{% endfor %}{{ '<end>' }}
{%- else %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endif %}{% endfor %}"""
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris", "days": 3, "metric": True, "to": None}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a place.", "parameters": {"properties": {"city": {"type": "string"}}}}}  # fmt: skip # noqa: E501
ASK = message("user", "Weather in Paris?")


def rendered(messages, template, turns="all", **row):
    return chat.prepare({"messages": messages, **row}, with_template(template), turns)


def refused(messages, template, turns="all", **row):
    with pytest.raises(InputError, match="the chat template leaves out") as caught:
        rendered(messages, template, turns, **row)
    assert not isinstance(caught.value, chat.TemplateError)  # so that --skip_malformed counts the row
    return str(caught.value)


def test_calls_that_a_template_drops_are_refused():
    said = refused([ASK, message("assistant", None, tool_calls=[CALL])], NAMES_ONLY)
    assert said == "the chat template leaves out what messages[1].tool_calls[0].name says: 'weather'"
    refused([ASK, message("assistant", "", function_call={"name": "f", "arguments": "{}"})], NAMES_ONLY)
    two = message("assistant", None, tool_calls=[CALL, {"function": {"name": "sea", "arguments": {}}}])
    assert "tool_calls[1].name says: 'sea'" in refused([ASK, two], LLAMA)
    assert rendered([ASK, two], CHATML)


def test_every_value_of_the_arguments_counts():
    keys = CHATML.replace("call.function | tojson", "call.function.name + (call.function.arguments | list | tojson)")
    assert "arguments.city says: 'Paris'" in refused([ASK, message("assistant", None, tool_calls=[CALL])], keys)
    deep = {"function": {"name": "f", "arguments": {"a": [{"b": 'x "q"\n'}], "c": [1, 2.5], "d": [], "e": ""}}}
    for template in (CHATML, LLAMA, JOINS, LING):
        assert rendered([ASK, message("assistant", None, tool_calls=[deep])], template)
    python = CHATML.replace("(call.function | tojson)", "(call.function | string)")
    assert rendered([ASK, message("assistant", None, tool_calls=[deep])], python)


@pytest.mark.parametrize("template", [CHATML, LLAMA, JOINS])
def test_calls_and_what_the_tool_says_may_be_escaped(template):
    turns = [ASK, message("assistant", None, tool_calls=[CALL]), message("tool", '{"sky":\n "blüe"}'), message("assistant", "It is.")]  # fmt: skip # noqa: E501
    (document,) = rendered(turns, template)
    assert "Paris" in document.text and document.text.count("weather") == 1
    ascii_only = template.replace("m.content | tojson", "m.content | tojson(ensure_ascii=True)")
    assert rendered(turns, ascii_only)


def test_arguments_are_text_only_for_templates_that_join_them():
    (document,) = rendered([ASK, message("assistant", None, tool_calls=[CALL])], JOINS)
    arguments = document.text.split("```")[1].removeprefix("json")
    assert json.loads(arguments) == CALL["function"]["arguments"]
    with pytest.raises(InputError, match="chat template: can only concatenate .*dict"):
        rendered([ASK, message("assistant", None, tool_calls=[CALL])], JOINS.replace("+ '```' }", "+ 1 }"))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("shown", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_shown_under_any_name(field, shown):
    turn = message("assistant", "42", **{field: "six sevens"})
    shows = NAMES_ONLY.replace("m.content", f"(m.{shown} or '') + m.content")
    assert rendered([ASK, turn], shows)[0].text.endswith("six sevens42<|im_end|>")
    assert "messages[1].reasoning_content says: 'six sevens'" in refused([ASK, turn], NAMES_ONLY)


@pytest.mark.parametrize("field", ["thought", "tool_plan", "refusal"])
def test_other_fields_that_say_something(field):
    assert f"messages[1].{field}" in refused([ASK, message("assistant", "a", **{field: "I will not"})], NAMES_ONLY)
    assert rendered([ASK, message("assistant", "a", **{field: None})], NAMES_ONLY)


@pytest.mark.parametrize("end", ["</think>", "</thinking>", "[/THINK]", "</reasoning>"])
@pytest.mark.parametrize("prompt", ["", "<think>\\n"])
def test_reasoning_that_is_cut_from_the_supervised_turn(end, prompt):
    cuts = NAMES_ONLY.replace("m.content", f"m.content.split('{end}')[-1]").replace("assistant\\n' }", f"assistant\\n{prompt}' }}")  # fmt: skip # noqa: E501
    turn = message("assistant", f"<think>\nsix sevens\n{end}\n\n42")
    assert "messages[1].content says" in refused([ASK, turn], cuts)


def test_a_generation_prompt_that_is_not_how_turns_begin():
    other = NAMES_ONLY.replace("assistant\\n' }", "assistant\\n<think>\\n' }")
    with pytest.raises(chat.TemplateError, match=r"generation prompt is not how it begins messages\[1\]"):
        rendered([ASK, message("assistant", "42")], other)


def test_reasoning_of_turns_that_are_not_supervised_may_be_left_out():
    turns = [
        ASK, message("assistant", "<think>a b</think>four"),
        message("user", "why?"), message("assistant", "so", reasoning_content="c d"),
        message("user", "sure?"), message("assistant", "yes", reasoning_content="e f"),
    ]  # fmt: skip
    with pytest.raises(chat.TemplateError, match=r"rewrites earlier turns, seen at messages\[1\]"):
        rendered(turns, QWEN3)
    (last,) = rendered(turns, QWEN3, "last")
    assert "a b" not in last.text and "c d" not in last.text and "<think>\ne f\n</think>\n\nyes" in last.text
    each = rendered(turns, QWEN3, "each")
    assert [document.text[slice(*document.spans[0])] for document in each] == [
        f"<think>\n{thought}\n</think>\n\n{said}<|im_end|>"
        for thought, said in (("a b", "four"), ("c d", "so"), ("e f", "yes"))
    ]
    prompt = chat.prompt({"messages": turns[:-1]}, with_template(QWEN3)).text
    assert "c d" not in prompt and "four" in prompt
    turns[1] |= {"weight": 0}
    turns[3] |= {"weight": 0}
    assert len(rendered(turns, QWEN3)[0].spans) == 1


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_roles_that_a_template_does_not_know(role):
    """LING shows a system turn only at the beginning, and no developer's."""
    turns = [ASK, message(role, "Be brief."), message("assistant", "ok")]
    if role == "tool":
        assert rendered(turns, LING)
    else:
        assert refused(turns, LING) == "the chat template leaves out what messages[1].content says: 'Be brief.'"
    assert rendered(turns, CHATML)


@pytest.mark.parametrize("word", ["assistant", "1", "brief", "m", "Weather in Paris?"])
def test_a_short_text_is_not_found_in_what_the_template_or_another_turn_says(word):
    no_tools = NAMES_ONLY.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'tool' %}1")
    turns = [ASK, message("tool", word), message("assistant", "a brief 1")]
    assert ".content" in refused(turns, no_tools)
    assert rendered(turns, NAMES_ONLY)


def test_tools_that_a_template_drops():
    turns = [ASK, message("assistant", "weather: city")]
    assert refused(turns, NAMES_ONLY, tools=[TOOL]) == "the chat template leaves out what tools say: 'weather'"
    refused(turns, "{% if tools %}{{ tools[0].function.name }}{% endif %}" + NAMES_ONLY, tools=[TOOL])
    for tools in ([TOOL], [TOOL["function"]], json.dumps([TOOL]), [json.dumps(TOOL)]):
        assert rendered(turns, CHATML, tools=tools) and rendered(turns, LLAMA, tools=tools)
    assert rendered(turns, CHATML, functions=[TOOL["function"]]) == rendered(turns, CHATML, tools=[TOOL])
    for nothing in ([], "", None, "[]"):
        assert rendered(turns, NAMES_ONLY, tools=nothing) == rendered(turns, NAMES_ONLY)


def test_a_template_that_takes_no_skeleton_is_still_checked():
    picky = "{% for m in messages %}{% if m.content.split() | length < 2 %}{{ raise_exception('short') }}{% endif %}{% endfor %}"  # noqa: E501
    turns = [message("user", "two words"), message("assistant", "and two")]
    assert rendered(turns, picky + NAMES_ONLY)
    assert "messages[0].content" in refused(turns, picky + NAMES_ONLY.replace("m.content", "m.content.split()[0]"))


def test_prompts_are_checked_alike():
    tokenizer = with_template(NAMES_ONLY)
    with pytest.raises(InputError, match="leaves out what tools say"):
        chat.prompt({"messages": [ASK], "tools": [TOOL]}, tokenizer)
    assert "Of a place." in chat.prompt({"messages": [ASK], "tools": [TOOL]}, with_template(CHATML)).text
    row = {"messages": [ASK, message("assistant", None, tool_calls=[CALL]), message("tool", "sunny")]}
    with pytest.raises(InputError, match=r"leaves out what messages\[1\]\.tool_calls\[0\]\.name"):
        chat.prompt(row, tokenizer)
    assert chat.prompt(row, with_template(CHATML)).text.endswith("sunny<|im_end|>\n<|im_start|>assistant\n")
