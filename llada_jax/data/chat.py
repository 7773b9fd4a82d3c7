"""Conversations: .jsonl and .parquet rows, the checkpoint's chat template, and the tokens that are supervised.

A row is one of
  {"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?: [...]}   rendered by the chat template
  {"prompt": text, "response": text}                                         as they are, no template
  {"input_ids": [...], "prompt_length": n}                                   (or "prompt_lengths": n)
and is read as the first of these whose keys it has; a null is an absent key, and other keys are ignored.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from llada_jax.data import text
from llada_jax.errors import InputError
from llada_jax.interop.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
_COLUMNS = ("messages", "tools", "prompt", "response", "input_ids", "prompt_length", "prompt_lengths")
_PARQUET_BATCH = 256


class TemplateError(InputError):
    """The chat template cannot say which tokens are the assistant's, and mending the row would not help."""


class Conversation(NamedTuple):
    """ids [n] int32 and the half-open token spans that are supervised: disjoint, not empty, in order, at least one."""

    ids: np.ndarray
    spans: list[tuple[int, int]]

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first that is supervised."""
        return self.spans[0][0]


class Rendered(NamedTuple):
    """The text of a conversation and the half-open spans of characters that are supervised, in order."""

    text: str
    spans: list[tuple[int, int]]


def list_files(source: str) -> list[text.SourceFile]:
    """Lists the .jsonl and .parquet files under `source`, as text.list_files. Raises InputError if there are none."""
    files = [file for file in text.list_files(source) if file.format in _READERS]
    if not files:
        raise InputError(f"{source}: empty dataset, no file matches *.jsonl, *.parquet")
    return files


def read_rows(
    files: Sequence[text.SourceFile], start: tuple[int, int] = (0, 0)
) -> Iterator[tuple[int, int, bytes | dict]]:
    """Yields (file index, offset, row for `parse_row`) in order, beginning with the row at `start`.

    Offsets are those of text.iter_documents: bytes in a .jsonl file, rows in a .parquet file. Raises InputError
    naming the file if it cannot be read.
    """
    first_file, first_offset = start
    for index in range(first_file, len(files)):
        file = files[index]
        try:
            for offset, row in _READERS[file.format](file.path, first_offset if index == first_file else 0):
                yield index, offset, row
        except OSError as error:
            raise InputError(f"{file.path}: {error.strerror or error}") from error


def place(file: text.SourceFile, offset: int) -> str:
    """Names a row in an error: path:line, or path:row N of a parquet file."""
    if file.format == "parquet":
        return f"{file.path}:row {offset}"
    return f"{file.path}:{text.line_number(file.path, offset)}"


def parse_row(row: bytes | dict) -> dict:
    """A row as a dict without nulls. Raises InputError, without the place, if it is not a JSON object."""
    if isinstance(row, bytes):
        row = text.parse_object(row)
    return {name: value for name, value in row.items() if value is not None}


def prepare(row: dict, tokenizer: Tokenizer, turns: str = "all") -> Rendered | Conversation | None:
    """Says what of a parsed row is supervised, for `tokenise`; None if nothing is.

    With `turns` "all" every assistant turn of `messages` that says something is supervised, with "last" only the
    last turn is; a turn goes from where the generation prompt ends to the end-of-turn marker, which belongs to it.
    What follows the last supervised turn is left out. A `response` ends with the end-of-sequence token; prompt and
    response are tokenised apart, as when a model is prompted.

    Raises InputError, without the place, if the row is malformed or the template rejects it, and TemplateError if
    there is no template or it does not keep the text of earlier turns.
    """
    if turns not in ("all", "last"):
        raise InputError(f'turns {turns!r} must be "all" or "last"')
    if "messages" in row:
        return _render(_messages(row["messages"]), _tools(row.get("tools")), tokenizer, turns)
    if "input_ids" in row:
        return _pretokenised(row, tokenizer)
    if "prompt" in row or "response" in row:
        return _pair(row.get("prompt"), row.get("response", ""), tokenizer)
    raise InputError("neither messages, nor prompt and response, nor input_ids")


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


def _render(messages: list[dict], tools: list | None, tokenizer: Tokenizer, turns: str) -> Rendered | None:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [
        i
        for i in (answers if turns == "all" else answers[-1:])
        if messages[i]["content"].strip() or messages[i].get("tool_calls")
    ]
    if not answers:
        return None
    if tokenizer.chat_template is None:
        raise TemplateError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")

    def render(stop: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:stop], add_generation_prompt=prompt, tools=tools)

    whole = render(answers[-1] + 1, False)
    _check_text(whole)
    spans = []
    for i in answers:
        before, after = render(i, True), whole if i == answers[-1] else render(i + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            hint = "" if turns == "last" else '; supervise only the last turn (turns "last")'
            raise TemplateError(f"the chat template rewrites earlier turns, seen at messages[{i}]{hint}")
        spans.append((len(before), len(before) + _turn_length(after[len(before) :], messages[i]["content"])))
    return Rendered(whole[: spans[-1][1]], spans)


def _turn_length(turn: str, content: str) -> int:
    """Characters of a rendered turn without the white space that separates it from the next."""
    return len(turn if content and turn.endswith(content) else turn.rstrip())


def _messages(messages) -> list[dict]:
    """The messages with a string as content, checked. Raises InputError naming the message."""
    if not isinstance(messages, list):
        raise InputError("messages is not a list")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"messages[{i}] is not an object")
        message = {name: value for name, value in message.items() if value is not None}
        role, calls = message.get("role"), message.get("tool_calls", [])
        if role not in ROLES:
            raise InputError(f"messages[{i}]: role {role!r} is none of {', '.join(ROLES)}")
        if role == "assistant":
            message.setdefault("content", "")  # a turn of tool calls has none, and templates print None as "None"
        if not isinstance(message.get("content"), str):
            raise InputError(f"messages[{i}]: content is not a string")
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise InputError(f"messages[{i}]: tool_calls is not a list of objects")
        checked.append(message)
    if checked and checked[0]["role"] == "assistant":
        raise InputError("messages[0] is the assistant's, with nothing to answer")
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


def _pair(prompt, response, tokenizer: Tokenizer) -> Conversation | None:
    for name, value in (("prompt", prompt), ("response", response)):
        if not isinstance(value, str):
            raise InputError(f"{name} is {'missing' if value is None else 'not a string'}")
        _check_text(value)
    if not response.strip():
        return None
    prompt_ids, end = tokenizer.encode(prompt), [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.asarray(prompt_ids + tokenizer.encode(response) + end, np.int32)
    return Conversation(ids, [(len(prompt_ids), len(ids))])


def _pretokenised(row: dict, tokenizer: Tokenizer) -> Conversation | None:
    ids, prompt_length = row["input_ids"], row.get("prompt_length", row.get("prompt_lengths"))
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise InputError("input_ids is not a list of token ids")
    if type(prompt_length) is not int or prompt_length < 0:
        raise InputError(f"prompt_length {prompt_length!r} is not a number of tokens")
    if ids and tokenizer.id_to_token(max(ids)) is None:
        raise InputError(f"input_ids: the tokenizer has no token {max(ids)}")
    if prompt_length >= len(ids):
        return None
    return Conversation(np.asarray(ids, np.int32), [(prompt_length, len(ids))])


def _check_text(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the text holds a lone surrogate") from error


def _read_jsonl(path: str, offset: int) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as stream:
        stream.seek(offset)
        while line := stream.readline():
            if line.strip():
                yield offset, line
            offset += len(line)


def _read_parquet(path: str, offset: int) -> Iterator[tuple[int, dict]]:
    try:
        with pq.ParquetFile(path) as table:
            columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
            if not columns:
                raise InputError(f"{path}: none of the columns {', '.join(_COLUMNS)}")
            row = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row + rows > offset:
                    for batch in table.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns):
                        records = batch.to_pylist() if row + len(batch) > offset else []
                        yield from ((at, _without_nulls(r)) for at, r in enumerate(records, row) if at >= offset)
                        row += len(batch)
                else:
                    row += rows
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a text is not UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unknown error"])[0]
        raise InputError(f"{path}: unreadable parquet file ({reason})") from error


def _without_nulls(value):
    """Leaves out absent keys: parquet gives every struct all the keys that any of its rows has."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet}
