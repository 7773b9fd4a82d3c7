"""The text of an answer while it is written: committed tokens in, text out that never changes afterwards.

What is given out never ends inside a character, nor holds what could still become a stop text. Whatever the cuts of the
tokens, all that is given out joins to the answer's whole text up to the first stop text.
"""

import dataclasses
from collections.abc import Collection, Sequence

from llada_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Given:
    """What is new: its text, and the numbers first, ..., last - 1 (from 0) of the answer's tokens whose text begins in
    it or before it, and which were not given yet.
    """

    text: str
    first: int
    last: int


class AnswerText:
    """The text that tokens add to a prompt, up to the first of `stops`, without special tokens but those of `named`.

    prompt: its ids. A stop text may hold the names of special tokens. named: such names that are text. offsets: of each
    token that was fed and has settled, where its text begins, in characters of the answer's text; with `each` false and
    neither stops nor `named`, where that of those that it settled with begins, which takes less time.

    Example:
        >>> from llada_jax.data.byte_tokenizer import byte_tokenizer
        >>> answer = AnswerText(byte_tokenizer(256), [], stops=["END"])
        >>> [answer.feed(list(part)).text for part in (b"one E", b"gg E", b"ND two")], answer.stopped
        (['one ', 'Egg ', ''], True)
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = (), each: bool = True,
        named: Collection[str] = (),
    ):  # fmt: skip
        self._tokens, self._stops, self._named = tokenizer.text, tuple(stops), named
        self._each = each or bool(stops) or bool(named)
        self._before = [int(i) for i in prompt]
        self._held: list[int] = []  # tokens whose text may still change
        self._written = ""  # text that has not been given, with the names of special tokens
        self._hidden: list[bool] = []  # which characters of it are such names
        self._starts: list[int] = []  # of each token, in all that was written
        self._gone = self._shown = self._pending = 0  # characters: written and given; given; shown and not given
        self._given = self._used = 0  # tokens
        self.offsets: list[int] = []
        self.stopped = False

    @property
    def count(self) -> int:
        """Tokens that were used: those that were fed; if stopped, up to the one that completes the stop text."""
        return self._used if self.stopped else len(self._starts) + len(self._held)

    def feed(self, tokens: Sequence[int]) -> Given:
        """Takes the next tokens. After a stop text it gives nothing."""
        tokens = [] if self.stopped else [int(token) for token in tokens]
        for part in ([token] for token in tokens) if self._each else [tokens]:
            self._held += part
            self._settle(self._tokens.settled(self._before, self._held))
        return self._give(last=False)

    def end(self) -> Given:
        """Says that no token follows. Gives the rest."""
        if not self.stopped:
            self._settle(len(self._held))
        return self._give(last=True)

    def _settle(self, count: int) -> None:
        """Writes the first held tokens, which share a character if they are several: all begin where it does."""
        if not count:
            return
        tokens, self._held = self._held[:count], self._held[count:]
        text = self._tokens.text_after(self._before, tokens)
        self._starts += [self._gone + len(self._written)] * len(tokens)
        self.offsets += [self._shown + self._pending] * len(tokens)
        self._pending += len(text)
        end = 0
        for i, token in enumerate(tokens if self._stops or self._named else ()):
            if (name := self._tokens.special(token)) is not None:
                place = len(self._tokens.text_after(self._before, tokens[:i])) if i else 0
                self._write(text[end:place], False)
                self._write(name, name not in self._named)
                self._pending += len(name) if name in self._named else 0
                end = place
        self._write(text[end:], False)
        self._before += tokens

    def _write(self, text: str, hidden: bool) -> None:
        self._written += text
        self._hidden += [hidden] * len(text)

    def _give(self, last: bool) -> Given:
        if self.stopped:
            return Given("", self._given, self._given)
        stop, size = self._first_stop()
        sure = len(self._written) if last else may_begin(self._written, self._stops)
        self.stopped = stop is not None and stop <= sure
        end = stop if self.stopped else sure if stop is None else min(sure, stop)
        text = "".join(c for c, hidden in zip(self._written[:end], self._hidden, strict=False) if not hidden)
        at, first = self._gone + end, self._given
        if self.stopped:
            self._used = sum(start < at + size for start in self._starts)
        while self._given < len(self._starts) and (self._starts[self._given] < at or (last and not self.stopped)):
            self._given += 1
        self._written, self._hidden, self._gone = self._written[end:], self._hidden[end:], at
        self._shown, self._pending = self._shown + len(text), self._pending - len(text)
        return Given(text, first, self._given)

    def _first_stop(self) -> tuple[int | None, int]:
        """Where the first stop text begins in what is written, and its length; of several there, the shortest."""
        found = [(at, len(stop)) for stop in self._stops if (at := self._written.find(stop)) >= 0]
        return min(found, default=(None, 0))


def may_begin(text: str, marks: Sequence[str]) -> int:
    """Where the first end of a text begins that one of the marks could begin with; else its length."""
    size, longest = len(text), max(map(len, marks), default=0)
    ends = range(max(size - longest + 1, 0), size)
    return next((i for i in ends if any(mark.startswith(text[i:]) for mark in marks)), size)
