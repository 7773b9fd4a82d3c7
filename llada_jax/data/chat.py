"""Conversations: the forms of their rows, the checkpoint's chat template, and the tokens that are supervised.

A row is one of
  {"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?: [...]}   rendered by the chat template
  {"input_ids": [...], S}       S is "labels" (-100 where not supervised), "supervised" (true or false for each token)
                                or "prompt_length" (or "prompt_lengths"): the number of tokens before the supervised
  {"prompt": text, "completion": text}          as they are, no template ("response" is another name of "completion")
  {"prompt": text or messages, "completion": text or messages}   with messages on one side at least: rendered
and is read as the first of these whose keys it has; a null is an absent key, and other keys are ignored.
"""

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from llada_jax.errors import InputError
from llada_jax.interop.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
TURNS = ("all", "last", "each")
IGNORED = -100  # the label of a token that is not supervised
_MASKS = ("labels", "supervised", "prompt_length", "prompt_lengths")
COLUMNS = ("messages", "tools", "prompt", "completion", "response", "input_ids", *_MASKS)


class TemplateError(InputError):
    """The chat template cannot say which tokens are the assistant's, and mending the row would not help."""


class Conversation(NamedTuple):
    """ids [n] int32 and the half-open token spans that are supervised: disjoint, not empty, in order, at least one.

    given: the ids are the row's own, which may have been cut at some length.
    """

    ids: np.ndarray
    spans: list[tuple[int, int]]
    given: bool = False

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first that is supervised."""
        return self.spans[0][0]


class Rendered(NamedTuple):
    """The text of a conversation and the half-open spans of characters that are supervised, in order."""

    text: str
    spans: list[tuple[int, int]]


def prepare(row: dict, tokenizer: Tokenizer, turns: str = "all") -> list[Rendered | Conversation]:
    """Says what of a parsed row is supervised, for `tokenise`; an empty list if nothing is.

    With `turns` "all" every assistant turn that says something is supervised, with "last" only the last turn is. Both
    give one document, which ends with the last supervised turn. "each" gives one document for every such turn: all
    that was said before, unsupervised, and the turn. Under "all" a turn that ends inside a block shares it with the
    user's next turn, which its noisy tokens then see although it comes later; "each" and "last" are free of that.

    A turn goes from where the generation prompt ends to the end-of-turn marker, which belongs to it; of `input_ids` it
    is a run of supervised tokens. A completion without template is as in `plain`.

    Raises InputError, without the place, if the row is malformed or the template rejects it, and TemplateError if
    there is no template or it does not keep the text of earlier turns.
    """
    if turns not in TURNS:
        raise InputError(f"turns {turns!r} is none of {', '.join(TURNS)}")
    if "messages" in row:
        return render(check_messages(row["messages"], "messages"), 0, row.get("tools"), tokenizer, turns)
    if "input_ids" in row:
        return _pretokenised(row, tokenizer, turns)
    name = "response" if "response" in row else "completion"
    if "prompt" not in row and name not in row:
        raise InputError("neither messages, nor prompt and completion, nor input_ids")
    prompt, completion = row.get("prompt"), row.get(name, "")
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = as_messages(prompt, "user", "prompt")
        return render_answer(messages, as_messages(completion, "assistant", name), name, row, tokenizer, turns)
    for field, value in (("prompt", prompt), (name, completion)):
        if not isinstance(value, str):
            raise InputError(f"{field} is {'missing' if value is None else 'neither a string nor messages'}")
    return plain(prompt, completion, tokenizer)


def tokenise(prepared: Sequence[Rendered | Conversation], tokenizer: Tokenizer) -> list[Conversation | None]:
    """Maps spans of characters to spans of tokens: a token is supervised when it starts inside a span.

    None stands for a conversation of which no token is supervised.
    """
    texts = [item.text for item in prepared if isinstance(item, Rendered)]
    encodings = iter(_exact_offsets(tokenizer).encode_batch(texts, add_special_tokens=False))
    return [_token_spans(next(encodings), item.spans) if isinstance(item, Rendered) else item for item in prepared]


def _token_spans(encoding: tokenizers.Encoding, spans: Sequence[tuple[int, int]]) -> Conversation | None:
    starts = [start for start, _ in encoding.offsets]
    spans = [tuple(np.searchsorted(starts, span).tolist()) for span in spans]
    spans = [(start, end) for start, end in spans if start < end]
    return Conversation(np.asarray(encoding.ids, np.int32), spans) if spans else None


@functools.lru_cache(maxsize=4)
def _exact_offsets(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without its post-processor, which may take the spaces of a token out of its offsets."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    copy.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # does nothing
    return copy


def render(messages: list[dict], first: int, tools, tokenizer: Tokenizer, turns: str = "all") -> list[Rendered]:
    """The documents of checked messages; those before messages[first] are prompt. Raises as `prepare`."""
    tools = _tools(tools)
    if messages and messages[0]["role"] == "assistant":
        raise InputError("messages[0] is the assistant's, with nothing to answer")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    answers = [
        i
        for i in (answers[-1:] if turns == "last" else answers)
        if messages[i]["content"].strip() or messages[i].get("tool_calls")
    ]
    if not answers:
        return []
    if tokenizer.chat_template is None:
        raise TemplateError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
    documents = [[i] for i in answers] if turns == "each" else [answers]
    return [_render_document(messages, answers, tools, tokenizer) for answers in documents]


def _render_document(messages: list[dict], answers: list[int], tools: list | None, tokenizer: Tokenizer) -> Rendered:
    """The conversation up to the last of the turns messages[answers], which are supervised."""

    def text(stop: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:stop], add_generation_prompt=prompt, tools=tools)

    whole = text(answers[-1] + 1, False)
    _check_text(whole)
    spans = []
    for i in answers:
        before, after = text(i, True), whole if i == answers[-1] else text(i + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            hint = "" if len(answers) == 1 else '; supervise one turn of a document (turns "each" or "last")'
            raise TemplateError(f"the chat template rewrites earlier turns, seen at messages[{i}]{hint}")
        spans.append((len(before), len(before) + _turn_length(after[len(before) :], messages[i]["content"])))
    return Rendered(whole[: spans[-1][1]], spans)


def render_answer(
    prompt: list[dict], answer: list[dict], name: str, row: dict, tokenizer: Tokenizer, turns: str = "all"
) -> list[Rendered]:
    """The documents of an answer, the field `name` of the row, to a prompt; both are checked messages.

    Raises InputError, without the place, if the prompt leaves nothing to answer or the answer is not the assistant's.
    """
    if not prompt or prompt[-1]["role"] == "assistant":
        raise InputError("prompt is empty or ends with the assistant's turn, so that there is nothing to answer")
    if answer and answer[0]["role"] != "assistant":
        raise InputError(f"{name} answers the prompt with the {answer[0]['role']}'s turn, expected the assistant's")
    return render(prompt + answer, len(prompt), row.get("tools"), tokenizer, turns)


def _turn_length(turn: str, content: str) -> int:
    """Characters of a rendered turn without the white space that separates it from the next."""
    return len(turn if content and turn.endswith(content) else turn.rstrip())


def as_messages(value, role: str, name: str) -> list[dict]:
    """A text as a message of this role, or messages, checked. Raises InputError naming the field."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise InputError(f"{name} is {'missing' if value is None else 'neither a string nor messages'}")
    return check_messages(value, name)


def check_messages(messages, name: str) -> list[dict]:
    """The messages with a string as content. Raises InputError naming the message of the field `name`."""
    if not isinstance(messages, list):
        raise InputError(f"{name} is not a list")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"{name}[{i}] is not an object")
        message = {field: value for field, value in message.items() if value is not None}
        role, calls = message.get("role"), message.get("tool_calls", [])
        if role not in ROLES:
            raise InputError(f"{name}[{i}]: role {role!r} is none of {', '.join(ROLES)}")
        if role == "assistant":
            message.setdefault("content", "")  # a turn of tool calls has none, and templates print None as "None"
        if not isinstance(message.get("content"), str):
            raise InputError(f"{name}[{i}]: content is not a string")
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise InputError(f"{name}[{i}]: tool_calls is not a list of objects")
        checked.append(message)
    return checked


def _tools(tools) -> list | None:
    if isinstance(tools, str):  # parquet cannot hold objects of any shape, so they are often kept as JSON
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise InputError("tools is not JSON") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError("tools is not a list of objects")
    return tools


def plain(prompt: str, completion: str, tokenizer: Tokenizer) -> list[Conversation]:
    """The document of a prompt and its completion without a template; none if the completion is blank.

    They are tokenised as one text, so that a completion is spelled as it is inside a text, and begin as the tokenizer
    begins documents. Supervised is what begins with the token that holds the completion's first character, all of it:
    a token over the border, which a prompt alone does not end with, is learned, as nothing before it says it. (A prompt
    that ends in a space makes such tokens of most tokenizers.) The end is an end of sequence.
    """
    for value in (prompt, completion):
        _check_text(value)
    if not completion.strip():
        return []
    encoding = _exact_offsets(tokenizer).encode(prompt + completion, add_special_tokens=False)
    ids = tokenizer.begun(encoding.ids)
    before = sum(end <= len(prompt) for _, end in encoding.offsets) if prompt else 0
    end = [] if tokenizer.eos_id is None or ids[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
    first = len(ids) - len(encoding.ids) + before
    if first == len(ids):  # the tokenizer leaves out what the completion says
        return []
    return [Conversation(np.asarray(ids + end, np.int32), [(first, len(ids) + len(end))])]


def _pretokenised(row: dict, tokenizer: Tokenizer, turns: str) -> list[Conversation]:
    ids = row["input_ids"]
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise InputError("input_ids is not a list of token ids")
    if ids and tokenizer.id_to_token(max(ids)) is None:
        raise InputError(f"input_ids: the tokenizer has no token {max(ids)}")
    edges = np.flatnonzero(np.diff(_mask(row, ids), prepend=False, append=False)).tolist()
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    spans = spans[-1:] if turns == "last" else spans
    documents = [[span] for span in spans] if turns == "each" else [spans] if spans else []
    return [Conversation(np.asarray(ids[: spans[-1][1]], np.int32), spans, given=True) for spans in documents]


def _mask(row: dict, ids: list[int]) -> np.ndarray:
    """Which of the ids are supervised, [n] bool."""
    given = [name for name in _MASKS if name in row]
    if len(given) != 1:
        raise InputError(
            f"input_ids comes with {' and '.join(given) or 'nothing'}, expected one of {', '.join(_MASKS)}"
        )
    (name,), value = given, row[given[0]]
    if name.startswith("prompt_length"):
        if type(value) is not int or value < 0:
            raise InputError(f"{name} {value!r} is not a number of tokens")
        return np.arange(len(ids)) >= value
    if not isinstance(value, list) or len(value) != len(ids):
        raise InputError(f"{name} is not a list of {len(ids)} entries, as input_ids is")
    if name == "labels":
        if any(label not in (token, IGNORED) for label, token in zip(value, ids, strict=True)):
            raise InputError(f"labels holds something else than {IGNORED} and the token of input_ids at its place")
        return np.asarray([label != IGNORED for label in value], bool)
    if not all(type(entry) is bool or entry in (0, 1) for entry in value):
        raise InputError("supervised holds something else than true and false")
    return np.asarray(value, bool)


def _check_text(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the text holds a lone surrogate") from error
