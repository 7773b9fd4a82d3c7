"""Needle in a haystack: synthetic questions about facts far back in a long text, as in RULER."""

import random

from llada_jax.errors import InputError
from llada_jax.evaluation.grading import numbers_in
from llada_jax.evaluation.questions import Question
from llada_jax.tokenizer import Tokenizer

_SUBJECTS = ("The river", "A gardener", "The old clock", "Her brother", "The train", "A sparrow", "The harbour", "Snow")
_VERBS = ("waits for", "passes", "remembers", "looks like", "belongs to", "is older than", "leads to", "hides")
_OBJECTS = ("the hill", "a wooden bridge", "the evening", "the market", "a letter", "the lighthouse", "an orchard")
_NAMES = (
    "apple", "basket", "candle", "dragon", "engine", "feather", "guitar", "hammer", "island", "jacket", "kettle",
    "ladder", "magnet", "needle", "orange", "pepper", "quartz", "rocket", "saddle", "teapot",
)  # fmt: skip


def needle_questions(tokenizer: Tokenizer, context: int, count: int, needles: int = 1, seed: int = 0) -> list[Question]:
    """`count` questions of at most `context` tokens each, a function of the seed.

    A question is filler text with `needles` facts, "The magic number of NAME is NUMBER.", and asks for one of them. The
    depth of that fact goes evenly from the beginning (question 0) to the end (the last question) and is the question's
    group. An answer is right if it contains the number, with or without separators, and no other fact's number. Raises
    InputError if the context is too short or there are more needles than names.
    """
    if not 1 <= needles <= len(_NAMES):
        raise InputError(f"needles={needles}, expected 1 to {len(_NAMES)}")
    if count < 1:
        raise InputError(f"questions={count}, expected at least 1")
    return [
        _question(tokenizer, context, i / max(count - 1, 1), needles, random.Random(f"{seed} {i}"))
        for i in range(count)
    ]


def _question(tokenizer: Tokenizer, context: int, depth: float, needles: int, draw: random.Random) -> Question:
    names = draw.sample(_NAMES, needles)
    numbers = [str(number) for number in draw.sample(range(10_000, 100_000), needles)]
    facts = [f"The magic number of {name} is {number}. " for name, number in zip(names, numbers, strict=True)]
    asked = f"\nWhat is the magic number of {names[0]}? Answer with the number alone."
    room = context - len(tokenizer.document_prefix) - sum(len(tokenizer.encode(text)) for text in (*facts, asked))
    filler = []
    while room > 0:
        filler.append(f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}. ")
        room -= len(tokenizer.encode(filler[-1]))
    if len(filler) < 2:
        raise InputError(f"context={context} tokens: too short for {needles} needles and a question")
    filler.pop()  # it was the one too many
    for fact in facts[1:]:
        filler.insert(draw.randrange(len(filler) + 1), fact)
    filler.insert(round(depth * len(filler)), facts[0])
    text = "".join(filler) + asked
    score = lambda answer: float(numbers_in(answer) & set(numbers) == {numbers[0]})  # noqa: E731
    if tokenizer.chat_template is None:
        return Question(None, text + "\nAnswer:", score, group=f"depth {depth:.2f}")
    return Question([{"role": "user", "content": text}], None, score, group=f"depth {depth:.2f}")
