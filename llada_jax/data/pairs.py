"""Preference pairs: two answers to one prompt, the chosen and the rejected one.

A row has `chosen` and `rejected`, texts or messages, and a prompt: `prompt`, an instruction (`question`, `input`, ...),
or messages before the answers. Without one, the prompt is the common beginning of two whole conversations.
data/README.md shows every shape, with its text.

Messages are rendered by the chat template. A text prompt is a user message, a text answer an assistant message; answers
that are messages may repeat the prompt's. Texts are used as they are, without a template, if all fields are texts and
there is no template, or if both texts are transcripts.
"""

import os
import re

from llada_jax.data.chat import Conversation, Rendered, plain, render_answer
from llada_jax.data.conversation import shapes
from llada_jax.data.conversation.messages import as_messages
from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

NAMES = ("chosen", "rejected")
COLUMNS = tuple(dict.fromkeys(("prompt", *NAMES, "tools", *shapes.ASK, *shapes.COLUMNS)))

# How transcripts name who speaks: "\n\nHuman: ", "### Response:", "<|im_start|>user\n", "[/INST]".
_SPEAKER = re.compile(
    r"^[ \t]*(?:#+[ ]*)?(?:(?P<asks>human|user|h|q|question|instruction|input|prompt|query)"
    r"|(?:assistant|ai|a|answer|response|output|bot|model|gpt|chatbot|summary|tl;dr))[ \t]*:"
    r"|<\|(?:im_start|start_header_id)\|>(?:(?P<asks_too>user|system)|assistant)\b(?:<\|end_header_id\|>)?"
    r"|<\|(?:(?P<asks_tag>user|system|prompter)|assistant)\|>|(?P<inst>\[INST\])|\[/INST\]",
    re.IGNORECASE | re.MULTILINE,
)


def prepare(row: dict, tokenizer: Tokenizer) -> list[Rendered | Conversation] | str:
    """The chosen and the rejected document of a parsed row for chat.tokenise, or the reason why it is unusable.

    Each document is the prompt and then the answer, of which every assistant turn is supervised. Reasons are "no
    response" and "identical answers". Raises as chat.prepare, and InputError if there is no prompt.
    """
    if not shapes.check_row(row):
        return "no response"
    answers = [row.get(name) for name in NAMES]
    for name, answer in zip(NAMES, answers, strict=True):
        if answer is None:
            raise InputError(f"{name} is missing; {shapes.keys_of(row)}")
    shapes.check_prompt(row)
    prompt = _prompt(row)
    texts = all(isinstance(answer, str) for answer in answers)
    if (
        texts
        and not shapes.has_context(row)
        and (prompt is None or (isinstance(prompt, str) and tokenizer.chat_template is None))
    ):
        prompt, answers = (prompt, answers) if prompt is not None else _split_texts(*answers)
        documents = [plain(prompt, answer, tokenizer) for answer in answers]
        identical = answers[0] == answers[1]
    else:
        prompt, answers = _split_messages(row, prompt, answers)
        documents = [
            render_answer(prompt, answer, name, row, tokenizer) for name, answer in zip(NAMES, answers, strict=True)
        ]
        identical = documents[0] == documents[1]
    if not all(documents):
        return "no response"
    return "identical answers" if identical else [document for (document,) in documents]


def _prompt(row: dict) -> str | list[dict] | None:
    """The prompt, a text or checked messages; None if the row has none."""
    if "prompt" in row:
        prompt = row["prompt"]
    elif (prompt := shapes.asked(row)) is None and "input" in row:
        prompt = row["input"]
    if prompt is None and not all(isinstance(row[name], list) for name in NAMES):
        name = shapes.first_of(shapes.CONVERSATION, row)
        prompt = None if name is None else row[name]
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError("prompt is empty")
    return prompt if isinstance(prompt, str | None) else as_messages(prompt, "user", "prompt")


def _split_texts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Returns (prompt, answers) of two transcripts that are equal until the assistant answers.

    A common beginning alone is not a prompt: it must contain a question, after which only an answer has begun. The
    texts are cut where that answer begins.
    """
    same = len(os.path.commonprefix([chosen, rejected]))
    speakers = [match for match in _SPEAKER.finditer(chosen) if match.end() <= same]
    asked = [any(match.groupdict().values()) for match in speakers]
    if chosen == rejected:
        return "", [chosen, rejected]
    if not speakers or asked[-1] or not any(asked):
        raise InputError(
            "prompt is missing, and chosen and rejected are no transcripts of the same question (Human: ... Assistant:)"
        )
    end = speakers[-1].end()
    return chosen[:end], [chosen[end:], rejected[end:]]


def _split_messages(row: dict, prompt, answers: list) -> tuple[list[dict], list[list[dict]]]:
    """Returns (prompt, answers) as checked messages; the answers do not repeat the prompt."""
    answers = [as_messages(answer, "assistant", name) for name, answer in zip(NAMES, answers, strict=True)]
    if prompt is None:
        same = [a == b for a, b in zip(*answers, strict=False)]
        count = (same + [False]).index(False)
        while count and answers[0][count - 1]["role"] == "assistant":
            count -= 1  # an answer cannot begin after an answer, as when one conversation goes on after the other
        return shapes.with_system(row, answers[0][:count]), [answer[count:] for answer in answers]
    prompt = as_messages(prompt, "user", "prompt")
    if all(answer[: len(prompt)] == prompt for answer in answers):
        answers = [answer[len(prompt) :] for answer in answers]
    return shapes.with_system(row, prompt), answers
