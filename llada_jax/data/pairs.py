"""Preference pairs: two answers to one prompt, the chosen and the rejected one.

A row is one of
  {"prompt": P, "chosen": A, "rejected": A}   P and A are texts or messages
  {"chosen": C, "rejected": C}                whole conversations; their prompt is what they have in common at the start
with "tools" for the chat template if there are any; a null is an absent key, and other keys are ignored.

Messages are rendered by the chat template. A prompt that is a text is a message of the user, an answer that is a text
one of the assistant; answers that are messages may repeat the prompt's. Texts are taken as they are, without template,
when all fields are texts and there is no template or no prompt. Then the prompt in common ends before the last white
space in common, so that no word is cut.
"""

from llada_jax.data.chat import Conversation, Rendered, as_messages, plain, render_answer
from llada_jax.errors import InputError
from llada_jax.interop.tokenizer import Tokenizer

COLUMNS = ("prompt", "chosen", "rejected", "tools")
NAMES = ("chosen", "rejected")


def prepare(row: dict, tokenizer: Tokenizer) -> list[Rendered | Conversation] | str:
    """The chosen and the rejected document of a parsed row for chat.tokenise, or the reason why it cannot be used.

    Each is the prompt, then the answer, supervised: every turn of the assistant if it has several. Reasons are "no
    response" and "identical answers". Raises as chat.prepare does.
    """
    answers = [row.get(name) for name in NAMES]
    for name, answer in zip(NAMES, answers, strict=True):
        if answer is None:
            raise InputError(f"{name} is missing")
    prompt = row.get("prompt")
    bare = prompt is None or (isinstance(prompt, str) and tokenizer.chat_template is None)
    if bare and all(isinstance(answer, str) for answer in answers):
        prompt, answers = (prompt, answers) if prompt is not None else _split_texts(*answers)
        documents = [plain(prompt, answer, tokenizer) for answer in answers]
        identical = answers[0] == answers[1]
    else:
        prompt, answers = _split_messages(prompt, answers)
        documents = [
            render_answer(prompt, answer, name, row, tokenizer) for name, answer in zip(NAMES, answers, strict=True)
        ]
        identical = documents[0] == documents[1]
    if not all(documents):
        return "no response"
    return "identical answers" if identical else [document for (document,) in documents]


def _split_texts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """(prompt, answers): the texts are cut before the last white space of what they have in common."""
    end = 0
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            break
        if a.isspace() and not (i and chosen[i - 1].isspace()):
            end = i
    return chosen[:end], [chosen[end:], rejected[end:]]


def _split_messages(prompt, answers: list) -> tuple[list[dict], list[list[dict]]]:
    """(prompt, answers) as checked messages, the prompt in neither answer."""
    answers = [as_messages(answer, "assistant", name) for name, answer in zip(NAMES, answers, strict=True)]
    if prompt is None:
        same = [a == b for a, b in zip(*answers, strict=False)]
        count = (same + [False]).index(False)
        while count and answers[0][count - 1]["role"] == "assistant":
            count -= 1  # an answer cannot begin after an answer, as when one conversation goes on after the other
        return answers[0][:count], [answer[count:] for answer in answers]
    prompt = as_messages(prompt, "user", "prompt")
    if all(answer[: len(prompt)] == prompt for answer in answers):
        answers = [answer[len(prompt) :] for answer in answers]
    return prompt, answers
