"""Is everything that a conversation says in its rendered text?

A template prints the fields that its author thought of and drops the others without a word. So each piece of what is
said (content, reasoning, the names and arguments of calls) is looked for in the text: white space does not count, and
a template may escape what it quotes. A short piece may be there by accident, in what the template itself writes: that
is seen in the text of a skeleton, the same conversation with a mark in place of each piece.
"""

import functools
import json
import re
from collections.abc import Collection
from typing import NamedTuple

from llada_jax.data.conversation import template
from llada_jax.data.conversation.messages import REASONING, SAID
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

_END_OF_REASONING = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning|seed:think)>|\[/THINK\]|<\|end_of_thought\|>|◁/think▷"
)
_FIRST_MARK = 0xF0000  # of a plane for private use, so no text's own


class _Piece(NamedTuple):
    place: str
    value: object  # a text, or another leaf of a call's arguments
    mark: str


def check(
    messages: list[dict],
    context: template.Context,
    tokenizer: Tokenizer,
    text: str,
    supervised: Collection[int] = (),
    prompt: bool = False,
) -> None:
    """Raises InputError naming the first piece of the checked messages, or the tool, that is not in their `text`.

    `text` is template.apply(messages, context, tokenizer, prompt).
    The reasoning of the assistant's turns that are not among those `supervised` may be left out: that is how models
    that reason are asked.
    """
    skeleton, pieces = _skeleton(messages)
    furniture = _furniture(tokenizer, json.dumps(skeleton, default=str), json.dumps(context, default=str), prompt)
    text, pieces = _squeeze(text), _needed(pieces, messages, supervised)
    plain = [_squeeze(_plain(piece.value)) for piece in pieces]
    whole = "\0".join(plain)
    for piece, bare in zip(pieces, plain, strict=True):
        times = whole.count(bare)  # other pieces may hold this one
        found = text.count(bare) >= times or sum(map(text.count, _forms(piece.value))) >= times
        if found and furniture is not None and len(bare) <= len(furniture):
            if any(form in furniture for form in _forms(piece.value)):
                found = any(form in furniture for form in _forms(piece.mark))
        if not found:
            raise InputError(f"the chat template leaves out what {piece.place} says: {_shorten(piece.value)}")
    for tool in context.tools or ():
        for said in _said_of_tool(tool):
            if not any(form in (text if furniture is None else furniture) for form in _forms(said)):
                raise InputError(f"the chat template leaves out what tools say: {_shorten(said)}")


def _skeleton(messages: list[dict]) -> tuple[list[dict], list[_Piece]]:
    """The messages with marks in place of what they say, and the pieces that the marks stand for."""
    pieces = []

    def mark(value, place: str) -> str:
        if isinstance(value, str) and not value.strip():
            return value
        pieces.append(_Piece(place, value, chr(_FIRST_MARK + len(pieces))))
        return pieces[-1].mark

    def leaves(value, place: str):
        if isinstance(value, dict):
            return {name: leaves(entry, f"{place}.{name}") for name, entry in value.items()}
        if isinstance(value, list) and not all(isinstance(entry, int | float) for entry in value):
            return [leaves(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
        return value if value == [] else mark(value, place)

    skeleton = []
    for i, message in enumerate(messages):
        marked = dict(message)
        for field in ("content", *SAID):
            if isinstance(value := message.get(field), str):
                again = field in REASONING[1:]
                marked[field] = marked[REASONING[0]] if again else mark(value, f"messages[{i}].{field}")
        if "tool_calls" in message:
            marked["tool_calls"] = []
        for j, call in enumerate(message.get("tool_calls", ())):
            said = {name: call["function"][name] for name in ("name", "arguments")}
            said = leaves(said, f"messages[{i}].tool_calls[{j}]")
            marked["tool_calls"].append(call | {"function": call["function"] | said})
        skeleton.append(marked)
    return skeleton, pieces


@functools.lru_cache(maxsize=1024)
def _furniture(tokenizer: Tokenizer, skeleton: str, context: str, prompt: bool) -> str | None:
    """The squeezed text of a skeleton, None if the template does not take it; it and the context are JSON.

    Most conversations of a dataset have one of a few skeletons.
    """
    try:
        return _squeeze(template.apply(json.loads(skeleton), template.Context(*json.loads(context)), tokenizer, prompt))
    except InputError:
        return None


def _needed(pieces: list[_Piece], messages: list[dict], supervised: Collection[int]) -> list[_Piece]:
    """The pieces without the reasoning that may be left out."""
    free = {f"messages[{i}]" for i, m in enumerate(messages) if m["role"] == "assistant" and i not in supervised}
    needed = []
    for piece in pieces:
        message, _, field = piece.place.partition(".")
        if message in free and field == "content":
            piece = piece._replace(value=_END_OF_REASONING.split(piece.value)[-1])
        if not (message in free and (field in SAID or not _squeeze(_plain(piece.value)))):
            needed.append(piece)
    return needed


def _said_of_tool(tool: dict) -> list[str]:
    """The name and description of a tool, and the names of its parameters."""
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    said = [function.get("name"), function.get("description"), *(properties if isinstance(properties, dict) else ())]
    return [text for text in said if isinstance(text, str) and text.strip()]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _forms(value) -> set[str]:
    """How templates print a value: as it is, as JSON, or as Python does."""
    if not isinstance(value, str):
        return {_squeeze(_plain(value)), _squeeze(str(value))}
    quoted = json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]
    return {_squeeze(form) for form in (value, *quoted)}


def _shorten(value) -> str:
    text = _plain(value).strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
