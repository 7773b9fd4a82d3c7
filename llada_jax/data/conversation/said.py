"""Checks that a rendered text contains everything that the conversation says.

A template prints the fields that its author thought of and silently drops the others. So each piece of a conversation
(content, reasoning, names and arguments of calls) is searched in the text; white space is ignored, and a template may
escape what it quotes. A short piece could also match the template's own text. To detect that, a skeleton is rendered:
the same conversation with a mark in place of each piece.
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
    """Raises InputError naming the first piece of the checked messages, or the tool, that is missing in their `text`.

    text: template.apply(messages, context, tokenizer, prompt). Reasoning of assistant turns that are not `supervised`
    may be missing, since prompts of reasoning models leave it out.
    """
    skeleton, pieces = _skeleton(messages)
    furniture = _furniture(tokenizer, json.dumps(skeleton, default=str), json.dumps(context, default=str), prompt)
    text, pieces = _squeeze(text), _needed(pieces, messages, supervised)
    plain = [_squeeze(_plain(piece.value)) for piece in pieces]
    whole = "\0".join(plain)
    for piece, bare in zip(pieces, plain, strict=True):
        times = whole.count(bare)  # other pieces may hold this one
        present = text.count(bare) >= times or sum(map(text.count, _forms(piece.value))) >= times
        if present and furniture is not None and len(bare) <= len(furniture):
            if any(form in furniture for form in _forms(piece.value)):
                present = any(form in furniture for form in _forms(piece.mark))
        if not present:
            raise InputError(f"the chat template leaves out what {piece.place} says: {_shorten(piece.value)}")
    for tool in context.tools or ():
        for said in _said_of_tool(tool):
            if not any(form in (text if furniture is None else furniture) for form in _forms(said)):
                raise InputError(f"the chat template leaves out what tools say: {_shorten(said)}")


def _skeleton(messages: list[dict]) -> tuple[list[dict], list[_Piece]]:
    """Returns (the messages with marks in place of their pieces, the pieces)."""
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
    """The text of a skeleton without white space; None if the template rejects it. skeleton, context: JSON.

    Cached: most conversations of a dataset share a few skeletons.
    """
    try:
        return _squeeze(template.apply(json.loads(skeleton), template.Context(*json.loads(context)), tokenizer, prompt))
    except InputError:
        return None


def _needed(pieces: list[_Piece], messages: list[dict], supervised: Collection[int]) -> list[_Piece]:
    """The pieces that must be in the text: all but reasoning that may be left out."""
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
