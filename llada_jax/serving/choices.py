"""One answer of a request while it is written: from events of the engine to what is said of it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from llada_jax.sampling.batches.requests import Answer
from llada_jax.serving.events import Event
from llada_jax.serving.text import AnswerText
from llada_jax.serving.tool_calls import Call, Markers, Reader
from llada_jax.tokenizer import Tokenizer

_LEAST = -9999.0  # log of a probability of 0, which JSON cannot hold; OpenAI's


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer. text: what it shows alone; data: its bytes. logprob: of its probability in the step that
    wrote it. offset: where its text begins in the answer, in characters. step: of its block, that wrote it.
    """

    text: str
    data: bytes
    logprob: float
    offset: int
    step: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of a choice. Its tokens are those whose text begins in it, or before it and was not told. standing:
    the blocks that are being written, (text or None where masked, step) of each token. calls: of tools, each as soon as
    it is whole. finish_reason: at the end.
    """

    index: int
    text: str = ""
    tokens: Sequence[Token] = ()
    standing: Sequence[tuple[str | None, int]] | None = None
    calls: Sequence[Call] = ()
    finish_reason: str | None = None


class Choice:
    """Choice `index` of a request. stops: texts that end it; ends: tokens that do. detailed: whether its tokens are
    told, not only its text. markers: of calls of tools, None where they are text. tokens, calls: all that were told so
    far. passes: (prefill, forward, commit) so far; None: not known.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], ends: set[int],
        detailed: bool = True, markers: Markers | None = None,
    ):  # fmt: skip
        self.index, self.tokens, self.calls, self.finish_reason = index, [], [], None
        self.passes: tuple[int, int, int] | None = None
        self.reused_tokens = 0
        named = markers.special if markers else ()
        self._text, self._detailed = AnswerText(tokenizer, prompt, stops, detailed, named), detailed
        self._reader = Reader(markers) if markers else None
        self._tokenizer, self._prompt, self._ends = tokenizer, [int(i) for i in prompt], ends
        self._ids: list[int] = []
        self._steps: list[int] = []
        self._confidence: list[float] = []

    @property
    def count(self) -> int:
        """Tokens of the answer: the end of sequence, and those of a stop text, too."""
        return self._text.count

    def take(self, event: Event) -> Delta | None:
        """What an event adds, if anything; after the end, nothing. "error" is not for here."""
        if self.finish_reason is not None:
            return None
        if event.kind == "provisional":
            return Delta(self.index, standing=self._standing(event))
        if event.kind == "done":
            return self._end(event.answer)
        self.passes = event.passes
        self._ids += event.tokens.tolist()
        self._steps += event.steps.tolist()
        self._confidence += event.confidence.tolist()
        given = self._text.feed(event.tokens.tolist())
        self.finish_reason = "stop" if self._text.stopped else None
        delta = self._delta(given)
        return delta if delta.text or delta.tokens or delta.calls or delta.finish_reason else None

    def _end(self, answer: Answer) -> Delta:
        self.passes = answer.prefill_passes, answer.forward_passes, answer.commit_passes
        self.reused_tokens = answer.reused_tokens
        given = self._text.end()
        at_its_end = bool(self._ids) and self._ids[-1] in self._ends
        self.finish_reason = "stop" if self._text.stopped or at_its_end else "length"
        return self._delta(given)

    def _delta(self, given) -> Delta:
        tokens = [self._token(i) for i in range(given.first, given.last)] if self._detailed else []
        self.tokens += tokens
        text, calls = self._parted(given.text)
        return Delta(self.index, text, tokens, calls=calls, finish_reason=self.finish_reason)

    def _parted(self, text: str) -> tuple[str, list[Call]]:
        """What of the text is sure to be beside calls, and the calls."""
        if self._reader is None:
            return text, []
        text, calls = self._reader.feed(text)
        if self.finish_reason is not None:
            rest, more = self._reader.end()
            text, calls = text + rest, calls + more
        self.calls += calls
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return text, calls

    def _token(self, i: int) -> Token:
        token, text = self._ids[i], self._tokenizer.text
        name = text.special(token)
        before = [*self._prompt[-64:], *self._ids[max(i - 64, 0) : i]]
        piece = text.piece(before, token) if name is None else ""
        data = name.encode() if name is not None else text.bytes_of(token) or piece.encode()
        probability = self._confidence[i]
        logprob = max(math.log(probability), _LEAST) if probability > 0 else _LEAST
        return Token(piece, data, logprob, self._text.offsets[i], self._steps[i])

    def _standing(self, event: Event) -> list[tuple[str | None, int]]:
        text, before, pieces = self._tokenizer.text, self._prompt[-64:] + self._ids[-64:], []
        for token, step in zip(event.tokens.tolist(), event.steps.tolist(), strict=True):
            masked = step < 0
            special = not masked and text.special(token) is not None
            pieces.append((None if masked else "" if special else text.piece(before, token), step))
            before = before if masked else [*before[-64:], token]
        return pieces


def usage(choices: Sequence[Choice], prompt_tokens: int, seconds: float) -> dict:
    """OpenAI's counts, and those of passes over the model: of all choices together, null where they are not known.
    tokens_per_forward: of their answers, over all passes.
    """
    tokens = sum(choice.count for choice in choices)
    known = all(choice.passes is not None for choice in choices)
    prefill, forward, commit = np.sum([choice.passes for choice in choices], 0).tolist() if known else (None,) * 3
    passes = prefill + forward + commit if known else None
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.reused_tokens for choice in choices)},
        "prefill_passes": prefill,
        "forward_passes": forward,
        "commit_passes": commit,
        "tokens_per_forward": round(tokens / max(passes, 1), 4) if known else None,
        "seconds": round(seconds, 4),
    }
