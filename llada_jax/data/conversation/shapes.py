"""The shapes of text rows: which columns hold the system turn, the prompt and the answer (see data/README.md)."""

from collections.abc import Sequence

from llada_jax.data.conversation.messages import as_messages, check_messages
from llada_jax.errors import InputError

CONVERSATION = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
ASK = ("instruction", "question", "query")
MORE = ("input", "context")  # what an instruction is about
ANSWER = ("output", "response", "completion", "answer")
CONTEXT = ("tools", "functions", "chat_template_kwargs", *SYSTEM, "history")
WEIGHT = ("weight", "sample_weight")
# Fields with a value per token, which need input_ids.
_OF_TOKENS = (
    "attention_mask", "supervised", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "weights",
)  # fmt: skip
# Fields that change the meaning of a row and are not supported.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_REFUSED = ("mask", "loss_weights", "loss_scale", "train_on_inputs", "train_on_prompt")
# Columns that are read for every shape.
COLUMNS = (*CONVERSATION, *CONTEXT, *MORE, *WEIGHT, "label", *_OF_TOKENS, *MEDIA, *_REFUSED)


def check_row(row: dict) -> bool:
    """Whether a row is for training: not if its weight is 0.

    Raises InputError naming a key that changes the meaning of the row and is not supported.
    """
    _refuse((*MEDIA, *_REFUSED), row)
    for name in _OF_TOKENS if "input_ids" not in row else ():
        if name in row:
            raise InputError(f"{name} says something of tokens, but there are no input_ids")
    # Of unpaired preferences, where it marks answers that are not to be learnt.
    if row.get("label") is False and ("completion" in row or "response" in row):
        raise InputError("label is false: an answer to avoid, which cannot be honoured")
    weights = {name: row[name] for name in WEIGHT if name in row}
    for name, value in weights.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise InputError(f"{name} {value!r} is neither 0 nor 1")
    return all(weights.values())


def check_prompt(row: dict) -> None:
    """Raises InputError naming a key that adds to a row's prompt and cannot be shown to the model.

    `input` or `context` beside a prompt is accepted if the prompt contains it.
    """
    _refuse(MEDIA, row)
    prompt = row.get("prompt")
    for name in MORE:
        more = row.get(name)
        if isinstance(prompt, str) and isinstance(more, str) and " ".join(more.split()) not in " ".join(prompt.split()):
            raise InputError(f"{name} is not in the prompt beside it, so what is asked is not clear")


def _refuse(names: Sequence[str], row: dict) -> None:
    for name in names:
        if row.get(name):
            raise InputError(f"{name} cannot be honoured")


def first_of(names: Sequence[str], row: dict) -> str | None:
    """The first of the names that the row has."""
    return next((name for name in names if name in row), None)


def keys_of(row: dict) -> str:
    """The keys of a row, for an error message."""
    names = [repr(name) if not name.isidentifier() else name for name in row]
    return f"the row has {', '.join(names[:20]) or 'nothing'}{', ...' if len(names) > 20 else ''}"


def conversation(row: dict) -> list[dict] | None:
    """The checked messages of a row that is a whole conversation, else None."""
    name = first_of(CONVERSATION, row)
    return None if name is None else with_system(row, check_messages(row[name], name))


def asked(row: dict) -> str | None:
    """The text of an instruction and its input; None if the row has none. Raises InputError."""
    name = first_of(ASK, row)
    if name is None:
        return None
    more = first_of(MORE, row)
    for field in (name, more):
        if field and not isinstance(row[field], str):
            raise InputError(f"{field} is not a string")
    return row[name] + (f"\n{row[more]}" if more and row[more].strip() else "")


def has_context(row: dict) -> bool:
    """Whether a row needs a chat template: it has a system turn, tools, or turns before the prompt."""
    return any(row.get(name) for name in CONTEXT)


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    """The messages after the row's `history` and its system turn, if it has them. Raises InputError."""
    messages = [*_history(row), *messages]
    for name in SYSTEM:
        text = row.get(name, "")
        if not isinstance(text, str):
            raise InputError(f"{name} is not a string")
        if not text.strip():
            continue
        if not messages or messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": text}, *messages]
        elif messages[0]["content"].strip() != text.strip():
            raise InputError(f"{name} is not what the system says in the messages")
    return messages


def _history(row: dict) -> list[dict]:
    """Turns before the prompt, [user, assistant] pairs or messages."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InputError("history is not a list")
    messages = []
    for i, entry in enumerate(history):
        if isinstance(entry, list):
            if len(entry) != 2 or not all(isinstance(text, str) for text in entry):
                raise InputError(f"history[{i}] is not what the user and what the assistant said")
            messages += [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), entry, strict=True)
            ]
        else:
            messages += as_messages(entry if isinstance(entry, dict) else None, "user", f"history[{i}]")
    if messages and any(name in row for name in CONVERSATION):
        raise InputError("both history and messages")
    return messages
