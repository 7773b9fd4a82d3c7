"""Conversations in the tokenizer's chat template."""

import json
from typing import NamedTuple

from llada_jax.data.conversation.messages import SUPERVISED, check_tools
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

_OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now")


class Context(NamedTuple):
    """The input of a template besides the messages: the tools, and variables of its own."""

    tools: list[dict] | None = None
    variables: dict = {}  # noqa: RUF012  never changed


def context_of(row: dict) -> Context:
    """The context that a row gives with `tools` and `chat_template_kwargs`. Raises InputError."""
    variables = row.get("chat_template_kwargs") or {}
    if isinstance(variables, str):
        try:
            variables = json.loads(variables)
        except (ValueError, RecursionError) as error:
            raise InputError("chat_template_kwargs is not JSON") from error
    if not isinstance(variables, dict) or (wrong := [name for name in _OURS if name in variables]):
        given = "is not an object" if not isinstance(variables, dict) else f"cannot set {wrong[0]}"
        raise InputError(f"chat_template_kwargs {given}")
    return Context(check_tools(row), variables)


def apply(messages: list[dict], context: Context, tokenizer: Tokenizer, prompt: bool) -> str:
    """The text of checked messages; with `prompt`, followed by what begins the assistant's next turn.

    Arguments of calls are passed as objects, or as JSON to a template that can only join texts. Raises InputError if
    there is no template or it rejects the messages.
    """
    messages = [{name: value for name, value in message.items() if name != SUPERVISED} for message in messages]

    def text(messages: list[dict]) -> str:
        return tokenizer.apply_chat_template(messages, prompt, context.tools, **context.variables)

    try:
        return text(messages)
    except InputError:
        if not any("tool_calls" in message for message in messages):
            raise
        try:
            return text([_with_json_arguments(message) for message in messages])
        except InputError:
            pass
        raise


def _with_json_arguments(message: dict) -> dict:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}
