"""Calls of tools in the text of an answer: a marker, a JSON object of a name and arguments, a marker.

Which markers they are is read off the checkpoint's own chat template: from how it writes a call of an earlier turn.
"""

import dataclasses
import json
import re

from llada_jax.data.conversation import template
from llada_jax.errors import InputError
from llada_jax.serving.text import may_begin
from llada_jax.tokenizer import Tokenizer

_SPACE = " \t\r\n"  # JSON's
_TAG = r"<[^<>\s]+>|\[/?[A-Z_]+\]"
_NAME, _ARGUMENTS = "name_of_a_probe", {"key": "value"}
_PART = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}]', re.DOTALL)  # a string, maybe unfinished, or a brace


@dataclasses.dataclass(frozen=True)
class Markers:
    """begin, end: what stands before and behind the object. arguments: the name of its second member, beside "name".
    special: those of begin and end that are special tokens, whose names no text shows otherwise.
    """

    begin: str
    end: str
    arguments: str = "arguments"
    special: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Call:
    """Call number `index` of an answer, from 0. arguments: an object, as the JSON text that the model wrote."""

    index: int
    name: str
    arguments: str


def markers_of(tokenizer: Tokenizer) -> Markers | None:
    """Those of the tokenizer's chat template; None where it writes no calls, or in another form."""
    call = {"id": "call_0", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    with_call = _rendered(tokenizer, {"content": "", "tool_calls": [call]})
    plain = _rendered(tokenizer, {"content": _NAME})
    found = with_call and _object_with_name(with_call)
    if not found:
        return None
    start, stop, arguments = found
    begin = re.search(rf"({_TAG})\s*\Z", with_call[:start])
    end = re.match(rf"\s*({_TAG})", with_call[stop:])
    before, _, after = plain.rpartition(_NAME)
    # Tags that a turn without calls has there too are the turn's.
    if not begin or not end or before.rstrip().endswith(begin[1]) or after.lstrip().startswith(end[1]):
        return None
    ids = {name: tokenizer.token_to_id(name) for name in (begin[1], end[1])}
    special = {name for name, i in ids.items() if i is not None and tokenizer.text.special(i) is not None}
    return Markers(begin[1], end[1], arguments, frozenset(special))


def _rendered(tokenizer: Tokenizer, turn: dict) -> str:
    """A conversation that ends with this turn of the assistant; "" where there is no template for it."""
    tool = {"type": "function", "function": {"name": "other", "description": "", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant"} | turn]
    try:
        return template.apply(messages, template.Context([tool]), tokenizer, prompt=False)
    except InputError:
        return ""


def _object_with_name(text: str) -> tuple[int, int, str] | None:
    """(start, stop, name of the arguments' member) of the probe's call, if it is an object of just these two."""
    for start in reversed([found.start() for found in re.finditer("{", text[: text.rfind(_NAME) + 1])]):
        try:
            value, stop = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        others = [name for name, member in value.items() if member == _ARGUMENTS]
        if value.get("name") == _NAME and len(value) == 2 and others:
            return start, stop, others[0]
    return None


class Reader:
    """Parts calls from the text beside them, as the text comes. Whatever its cuts, the result is the same.

    A call that is not whole, or whose object is not JSON of just a name and arguments, stays text as it is. White space
    before a call, or between the last one and the end, is the template's and no text.

    Example:
        >>> from llada_jax.serving.tool_calls import Markers, Reader
        >>> reader = Reader(Markers("<call>", "</call>"))
        >>> reader.feed('Wait. <ca'), reader.feed('ll>{"name": "f", "arguments": {}}</call>')
        (('Wait.', []), ('', [Call(index=0, name='f', arguments='{}')]))
    """

    def __init__(self, markers: Markers):
        self._markers, self._held, self._count = markers, "", 0
        self._after_call = False  # whether nothing but white space is held behind a call

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """What is sure of the text so far and was not given yet: text outside of calls, and whole calls."""
        self._held += text
        return self._read(last=False)

    def end(self) -> tuple[str, list[Call]]:
        """Says that no text follows. Gives the rest."""
        return self._read(last=True)

    def _read(self, last: bool) -> tuple[str, list[Call]]:
        text, calls, held, begin = "", [], self._held, self._markers.begin
        while (start := held.find(begin)) >= 0:
            found = self._call(held, start + len(begin))
            if found is None and not last:
                sure = start
                break
            call, stop = found or (None, 0)
            if call is None:
                text, held = text + held[: start + len(begin)], held[start + len(begin) :]
            else:
                text, held = text + held[:start].rstrip(_SPACE), held[stop:]
                calls.append(call)
            self._after_call = call is not None
        else:
            sure = len(held) if last else may_begin(held, [begin])
        if not last or (self._after_call and not held.strip(_SPACE)):
            sure = len(held[:sure].rstrip(_SPACE))
        self._after_call = self._after_call and not sure
        self._held = held[sure:]
        return text + held[:sure], calls

    def _call(self, text: str, start: int) -> tuple[Call | None, int] | None:
        """(the call whose marker ends at `start`, or None if it is none; where it ends); None: not known yet."""
        start += len(text[start:]) - len(text[start:].lstrip(_SPACE))
        stop = _object_end(text, start)
        if stop is None:
            return None
        members = _members(text[start:stop])
        name, arguments = (members.get(key, "") for key in ("name", self._markers.arguments))
        if len(members) != 2 or not name.startswith('"') or not arguments.startswith("{"):
            return None, 0
        if not (name := json.loads(name)).strip():
            return None, 0
        rest = text[stop:].lstrip(_SPACE)
        if not rest.startswith(self._markers.end):
            return None if self._markers.end.startswith(rest) else (None, 0)
        self._count += 1
        return Call(self._count - 1, name, arguments), len(text) - len(rest) + len(self._markers.end)


def _object_end(text: str, start: int) -> int | None:
    """Where the object that begins at `start` ends; `start` if none begins there; None: not known yet."""
    if text[start : start + 1] not in ("{", ""):
        return start
    depth = 0
    for part in _PART.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(part[0], 0)
        if depth == 0:
            return part.end()
    return None


def _members(text: str) -> dict[str, str]:
    """The members of a JSON object, {name: value as JSON text}; {} if it is none, or one of them stands there twice."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    try:
        count = len(json.loads(text, object_pairs_hook=list, parse_constant=_no_constant))
        found, at = {}, 1
        for _ in range(count):
            name, at = decoder.raw_decode(text, _behind(text, at))
            start = _behind(text, at)
            _, at = decoder.raw_decode(text, start)
            found[name] = text[start:at]
    except (ValueError, RecursionError):
        return {}
    return found if len(found) == count else {}


def _behind(text: str, at: int) -> int:
    """The place behind white space, commas and colons."""
    return re.compile(r"[\s,:]*").match(text, at).end()


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")
