"""Conversations: rendered by the checkpoint's chat template, with the tokens that are supervised.

A row is a conversation, token ids with supervised spans, a prompt and its completion, or an instruction and its output:
the first of these whose keys it has. data/README.md shows every shape, with its text. A null counts as an absent key.
A row is refused if the text leaves out something that the row says; keys without a meaning here are ignored.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from llada_jax.data.conversation import said, shapes, template, token_rows
from llada_jax.data.conversation.messages import SUPERVISED, as_messages
from llada_jax.data.conversation.template import Context, context_of
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

TURNS = ("all", "last", "each")
COLUMNS = tuple(
    dict.fromkeys(("messages", "tools", "prompt", *shapes.ANSWER, *token_rows.COLUMNS, *shapes.ASK, *shapes.COLUMNS))
)


class TemplateError(InputError):
    """The chat template does not show which tokens are the assistant's; changing the row would not help."""


class Conversation(NamedTuple):
    """ids [n] int32 and the supervised half-open token spans: at least one, not empty, disjoint and in order.

    given: the ids are the row's own and may have been cut at some length.
    """

    ids: np.ndarray
    spans: list[tuple[int, int]]
    given: bool = False

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first supervised one."""
        return self.spans[0][0]


class Rendered(NamedTuple):
    """The text of a conversation and its supervised half-open character spans, in order."""

    text: str
    spans: list[tuple[int, int]]


class Prompt(NamedTuple):
    """The text that a model continues. rendered: by the chat template, which writes the beginning of sequence too."""

    text: str
    rendered: bool

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """A bare prompt begins as the tokenizer begins documents."""
        return tokenizer.encode(self.text) if self.rendered else tokenizer.encode_document(self.text)


def prepare(row: dict, tokenizer: Tokenizer, turns: str = "all") -> list[Rendered | Conversation]:
    """Returns the documents of a parsed row, with supervised spans, for `tokenise`; [] if nothing is supervised.

    turns: "all" supervises every non-empty assistant turn, "last" only the last turn; both give one document, which
    ends with the last supervised turn. "each" gives one document per such turn: all earlier turns, unsupervised, and
    then that turn. Under "all", a turn that ends inside a block shares the block with the user's next turn, so its
    noisy tokens see a later turn; "each" and "last" avoid that.

    A turn starts where the generation prompt ends and includes the end-of-turn marker. For `input_ids` it is a run of
    supervised tokens. A completion without a template is as in `plain`.

    Raises InputError, without the file and line, if the row is malformed, or if the template rejects it or leaves out
    something that it says. Raises TemplateError if there is no template, or if it changes the text of earlier turns.
    """
    if turns not in TURNS:
        raise InputError(f"turns {turns!r} is none of {', '.join(TURNS)}")
    if not shapes.check_row(row):
        return []
    if (messages := shapes.conversation(row)) is not None:
        return render(messages, 0, context_of(row), tokenizer, turns)
    if "input_ids" in row:
        runs = token_rows.runs(row, tokenizer)
        return [Conversation(ids, spans, given=True) for ids, spans in token_rows.documents(*runs, turns)]
    answer = shapes.first_of(("response", "completion"), row)
    complete = "prompt" in row and answer is not None  # or the prompt may be an instruction, written out
    answer = answer or shapes.first_of(shapes.ANSWER, row)
    asked = None if complete else shapes.asked(row)
    if asked is not None and (answer is not None or "prompt" not in row):
        answer = answer or "output"
        messages = as_messages(asked, "user", "instruction") + as_messages(row.get(answer), "assistant", answer)
        return render(shapes.with_system(row, messages), 0, context_of(row), tokenizer, turns)
    if "prompt" not in row and answer not in ("response", "completion"):
        known = "messages, nor prompt and completion, nor input_ids, nor instruction and output"
        raise InputError(f"neither {known}; {shapes.keys_of(row)}")
    return _prompt_and_completion(row, answer or "completion", tokenizer, turns)


def _prompt_and_completion(row: dict, name: str, tokenizer: Tokenizer, turns: str) -> list[Rendered | Conversation]:
    """The documents of a row with a prompt and a completion in the field `name`."""
    shapes.check_prompt(row)
    prompt, completion = row.get("prompt"), row.get(name, "")
    if isinstance(prompt, list) or isinstance(completion, list | dict) or shapes.has_context(row):
        messages = shapes.with_system(row, as_messages(prompt, "user", "prompt"))
        return render_answer(messages, as_messages(completion, "assistant", name), name, row, tokenizer, turns)
    for field, value in (("prompt", prompt), (name, completion)):
        if not isinstance(value, str):
            raise InputError(f"{field} is {'missing' if value is None else 'neither a string nor messages'}")
    return plain(prompt, completion, tokenizer)


def prompt(row: dict, tokenizer: Tokenizer, chat: bool = False) -> Prompt:
    """The prompt of a row with `messages` or `prompt`, including what begins the assistant's turn.

    A text prompt is used as it is; with `chat`, or beside a system turn, tools or history, it is the user's turn.
    Raises InputError, without the file and line, if the row has neither or both, if there is nothing to answer, or if
    the template rejects the row or leaves something out.
    """
    shapes.check_prompt(row)
    messages = shapes.conversation(row)
    if (messages is None) == ("prompt" not in row):
        raise InputError(f'expected "prompt" (text) or "messages" (list); {shapes.keys_of(row)}')
    if messages is None:
        if isinstance(row["prompt"], str) and not (chat or shapes.has_context(row)):
            _check_text(row["prompt"])
            if not row["prompt"]:
                raise InputError("prompt is empty: there is nothing to continue")
            return Prompt(row["prompt"], False)
        messages = shapes.with_system(row, as_messages(row["prompt"], "user", "prompt"))
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("prompt is empty or ends with the assistant's turn, so that there is nothing to answer")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise InputError("prompt is empty: the user says nothing")
    context = context_of(row)
    text = template.apply(messages, context, tokenizer, True)
    _check_text(text)
    said.check(messages, context, tokenizer, text, prompt=True)
    return Prompt(text, True)


def tokenise(prepared: Sequence[Rendered | Conversation], tokenizer: Tokenizer) -> list[Conversation | None]:
    """Maps character spans to token spans: a token is supervised if it starts inside a span.

    The result is None for a conversation without a supervised token.
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
    """The tokenizer without its post-processor, which may trim the spaces of a token from its offsets."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    copy.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # does nothing
    return copy


def render(messages: list[dict], first: int, context: Context, tokenizer: Tokenizer, turns="all") -> list[Rendered]:
    """The documents of checked messages; those before messages[first] are the prompt. Raises as `prepare`."""
    if messages and messages[0]["role"] == "assistant":
        raise InputError("messages[0] is the assistant's, with nothing to answer")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    answers = [i for i in (answers[-1:] if turns == "last" else answers) if _is_supervised(messages[i])]
    if not answers:
        return []
    if not tokenizer.chat_templates:
        raise TemplateError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
    documents = [[i] for i in answers] if turns == "each" else [answers]
    return [_render_document(messages, answers, context, tokenizer) for answers in documents]


def _is_supervised(message: dict) -> bool:
    says = any(message.get(name, "").strip() for name in ("content", *said.SAID)) or "tool_calls" in message
    return says and message.get(SUPERVISED, True)


def _render_document(messages: list[dict], answers: list[int], context: Context, tokenizer: Tokenizer) -> Rendered:
    """The conversation up to the last turn of `answers`, indices of the supervised messages."""

    def text(stop: int, prompt: bool) -> str:
        return template.apply(messages[:stop], context, tokenizer, prompt)

    def check(text: str, last: int) -> None:
        said.check(messages[: last + 1], context, tokenizer, text, [i for i in answers if i <= last])

    whole = text(answers[-1] + 1, False)
    _check_text(whole)
    spans = []
    for i in answers:
        before, after = text(i, True), whole if i == answers[-1] else text(i + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            check(after, i)
            if not after.startswith(before):
                wrong = f"the chat template's generation prompt is not how it begins messages[{i}]"
                raise TemplateError(f"{wrong}; it ends in {before[-20:]!r}")
            hint = '; supervise one turn of a document (turns "each" or "last")'
            raise TemplateError(f"the chat template rewrites earlier turns, seen at messages[{i}]{hint}")
        spans.append((len(before), len(before) + _turn_length(after[len(before) :], messages[i]["content"])))
    check(whole, answers[-1])
    return Rendered(whole[: spans[-1][1]], spans)


def render_answer(
    prompt: list[dict], answer: list[dict], name: str, row: dict, tokenizer: Tokenizer, turns: str = "all"
) -> list[Rendered]:
    """The documents of a prompt and its answer, the field `name` of the row; both are checked messages.

    Raises InputError, without the file and line, if there is nothing to answer or the answer is not the assistant's.
    """
    if not prompt or prompt[-1]["role"] == "assistant":
        raise InputError("prompt is empty or ends with the assistant's turn, so that there is nothing to answer")
    if answer and answer[0]["role"] != "assistant":
        raise InputError(f"{name} answers the prompt with the {answer[0]['role']}'s turn, expected the assistant's")
    return render(prompt + answer, len(prompt), context_of(row), tokenizer, turns)


def _turn_length(turn: str, content: str) -> int:
    """Length in characters of a rendered turn without the white space before the next one."""
    return len(turn if content and turn.endswith(content) else turn.rstrip())


def plain(prompt: str, completion: str, tokenizer: Tokenizer) -> list[Conversation]:
    """The document of a prompt and its completion without a template; [] if the completion is blank.

    Both are tokenised as one text, so that the completion is spelled as inside a text. The document begins as the
    tokenizer begins documents and ends with an end of sequence. Supervision starts at the token that holds the
    completion's first character: a token across the border is learned, since the prompt alone does not end with it.
    (With most tokenizers, a prompt that ends in a space makes such a token.)
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


def _check_text(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the text holds a lone surrogate") from error
