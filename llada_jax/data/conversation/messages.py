"""Converts messages of all file formats to the one form that chat templates expect.

{"role": one of ROLES, "content": text, "tool_calls"?: [{"function": {"name", "arguments": {}}}], ...}; data/README.md
shows what is read. SUPERVISED is false in a message that its row excludes from training.
"""

import json
from collections.abc import Mapping

from llada_jax.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
SUPERVISED = "supervised"
REASONING = ("reasoning_content", "reasoning", "thinking")  # names for the same, each known to some templates
# Fields with a content of their own, which must appear in the rendered text.
SAID = (*REASONING, "thought", "thoughts", "tool_plan", "refusal")
_SHAREGPT = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_FLAGS = ("weight", "train", "training", "trainable", "loss")  # whether a turn is learnt
# Fields that change the meaning of a message and are not supported.
_REFUSED = (
    "mask", "masked", "loss_mask", "loss_weight", "loss_scale", "ignore", "train_detail", "training_detail",
    "prefix", "partial", "audio", "image", "images", "video", "videos",
)  # fmt: skip


def as_messages(value, role: str, name: str) -> list[dict]:
    """Checked messages from a text (as this role's), a message, or messages. Raises InputError naming the field."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) and not (isinstance(value, dict) and ("role" in value or "from" in value)):
        raise InputError(f"{name} is {'missing' if value is None else 'neither a string nor messages'}")
    return check_messages([value] if isinstance(value, dict) else value, name)


def check_messages(messages, name: str) -> list[dict]:
    """The messages in the common form. Raises InputError naming the message within the field `name`."""
    if isinstance(messages, str):
        messages = _parsed(messages, list, f"{name} is not a list")
    if not isinstance(messages, list):
        raise InputError(f"{name} is not a list")
    return [_check(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _check(message, name: str) -> dict:
    if not isinstance(message, dict):
        raise InputError(f"{name} is not an object")
    message = {field: value for field, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, name)
    if message.get("role") == "function":
        message["role"] = "tool"
    if message.get("role") not in ROLES:
        raise InputError(f"{name}: role {message.get('role')!r} is none of {', '.join(ROLES)}")
    for field in _REFUSED:
        if message.get(field):
            raise InputError(f"{name}: {field} cannot be honoured")
    message = _with_flag(message, name)
    if message["role"] == "assistant":
        message.setdefault("content", "")  # a turn of tool calls has none, and templates print None as "None"
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], name)
    if not isinstance(message.get("content"), str):
        raise InputError(f"{name}: content is not a string")
    for field in SAID:
        if not isinstance(message.get(field, ""), str):
            raise InputError(f"{name}: {field} is not a string")
    return _with_calls(_with_reasoning(message, name), name)


def _from_sharegpt(message: dict, name: str) -> dict:
    speaker, value = message.pop("from"), message.pop("value", None)
    if speaker not in _SHAREGPT:
        raise InputError(f"{name}: from {speaker!r} is none of {', '.join(_SHAREGPT)}")
    message = {"role": _SHAREGPT[speaker]} | message
    if speaker != "function_call":
        return message if value is None else message | {"content": value}
    calls = value if not isinstance(value, str) else _parsed(value, dict | list, f"{name}: value is no JSON")
    return message | {"tool_calls": calls if isinstance(calls, list) else [calls]}


def _with_flag(message: dict, name: str) -> dict:
    """The message with SUPERVISED instead of the flags of other tools."""
    given = {field: message[field] for field in _FLAGS if field in message}
    for field, value in given.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise InputError(f"{name}: {field} {value!r} is neither 0 nor 1")
        if value and message["role"] != "assistant":
            raise InputError(f"{name}: {field} {value!r} asks for the {message['role']}'s turn to be supervised")
    if len(set(map(bool, given.values()))) > 1:
        raise InputError(f"{name}: {' and '.join(given)} contradict each other")
    message = {field: value for field, value in message.items() if field not in given and field != SUPERVISED}
    return message | ({SUPERVISED: False} if given and not all(given.values()) else {})


def _joined(parts: list, name: str) -> str:
    """The text of content parts."""
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{name}: content is not a string, nor text parts")
    for i, part in enumerate(parts):
        if part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise InputError(f"{name}: content[{i}] is of type {part.get('type')!r}, only text is read")
    return "".join(part["text"] for part in parts)


def _with_reasoning(message: dict, name: str) -> dict:
    """The message with its reasoning under every name that templates use."""
    given = {field: message[field] for field in REASONING if message.get(field)}
    if len(set(given.values())) > 1:
        raise InputError(f"{name}: {' and '.join(given)} differ")
    return message | dict.fromkeys(REASONING, next(iter(given.values()))) if given else message


def _with_calls(message: dict, name: str) -> dict:
    calls = message.get("tool_calls", [])
    if isinstance(calls, str):  # as parquet often keeps what has no fixed shape
        calls = _parsed(calls, list, f"{name}: tool_calls is not a list of objects") if calls.strip() else []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{name}: tool_calls is not a list of objects")
    if message.get("function_call"):
        calls = calls or [message["function_call"]]
        if calls != [message["function_call"]]:
            raise InputError(f"{name}: both function_call and tool_calls")
    message = {field: value for field, value in message.items() if field not in ("function_call", "tool_calls")}
    calls = [_call(call, f"{name}: tool_calls[{i}]") for i, call in enumerate(calls)]
    return message | ({"tool_calls": calls} if calls else {})


def _call(call, name: str) -> dict:
    """A call as {"type", "function": {"name", "arguments": {}}}, with its id, if any."""
    if isinstance(call, dict) and "function" not in call:  # flat, as models write it
        parts = ("name", "arguments", "parameters")
        call = {field: value for field, value in call.items() if field not in parts} | {
            "function": {field: call[field] for field in parts if field in call}
        }
    function = call["function"] if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise InputError(f"{name} has no name")
    arguments = function.get("arguments") or function.get("parameters") or {}
    if isinstance(arguments, str):  # as in OpenAI's wire format; a template would print it with a string's quotes
        wrong = f"{name}: arguments {arguments[:40]!r} is a string that holds no JSON object"
        arguments = _parsed(arguments, dict, wrong) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise InputError(f"{name}: arguments is not an object")
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}


def check_tools(row: Mapping) -> list[dict] | None:
    """The tools of a row, under either of OpenAI's names; None if it has none. Raises InputError."""
    tools = _objects(row.get("tools"), "tools")
    functions = [{"type": "function", "function": each} for each in _objects(row.get("functions"), "functions")]
    if tools and functions:
        raise InputError("both tools and functions")
    return tools or functions or None


def _objects(value, name: str) -> list[dict]:
    if isinstance(value, str):  # parquet cannot hold objects of any shape, so they are often kept as JSON
        value = _parsed(value, object, f"{name} is not JSON") if value.strip() else []
    if value is None:
        return []
    if isinstance(value, list):
        value = [_parsed(x, dict, f"{name} is not a list of objects") if isinstance(x, str) else x for x in value]
    if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise InputError(f"{name} is not a list of objects")
    return value


def _parsed(text: str, kind, wrong: str):
    """The JSON value in a text. Raises InputError(wrong) if there is none, or one of another type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(wrong) from error
    if not isinstance(value, kind):
        raise InputError(wrong)
    return value
