"""What is sent back, in OpenAI's shapes: whole answers and chunks, of both kinds of completions."""

import dataclasses
from collections.abc import Sequence

from llada_jax.serving.asked import Asked, Chat
from llada_jax.serving.choices import Choice, Delta, Token
from llada_jax.serving.tool_calls import Call


@dataclasses.dataclass(frozen=True)
class Form:
    """How answers to one request look. created: seconds since the epoch. echoes: the text before each answer."""

    asked: Asked
    model: str
    name: str
    created: int
    echoes: Sequence[str]

    @property
    def _is_chat(self) -> bool:
        return isinstance(self.asked, Chat)

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], usage: dict) -> dict:
        """The answer to a request that does not stream."""
        found = []
        for choice, text in zip(choices, texts, strict=True):
            entry = {"index": choice.index, "logprobs": self._logprobs(choice.tokens, choice.index)}
            entry["finish_reason"] = choice.finish_reason
            if self._is_chat:
                entry["message"] = {"role": "assistant", "content": text, "refusal": None}
                if choice.calls:
                    calls = [self._call(choice.index, call) for call in choice.calls]
                    entry["message"] |= {"content": text or None, "tool_calls": calls}
            else:
                entry["text"] = self.echoes[choice.index] + text
            found.append(entry)
        return self._head("chat.completion" if self._is_chat else "text_completion") | {
            "choices": found,
            "usage": usage,
        }

    def first(self, index: int) -> dict | None:
        """The chunk before those of a choice; None if there is none."""
        if self._is_chat:
            return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])
        return self._chunk([self._choice(index, self.echoes[index])]) if self.echoes[index] else None

    def chunks(self, delta: Delta) -> list[dict]:
        """Those of what is new: the text, the calls, the block that is being written, the end."""
        found = []
        if delta.text or delta.tokens:
            content = {"content": delta.text} if self._is_chat else delta.text
            chunk = self._chunk([self._choice(delta.index, content, self._logprobs(delta.tokens, delta.index))])
            if self.asked.provisional:
                chunk["committed"] = _pieces(delta.index, [(token.text, token.step) for token in delta.tokens])
            found.append(chunk)
        if delta.calls:
            calls = [{"index": call.index} | self._call(delta.index, call) for call in delta.calls]
            found.append(self._chunk([self._choice(delta.index, {"tool_calls": calls})]))
        if delta.standing is not None:
            empty = self._chunk([self._choice(delta.index, {} if self._is_chat else "")])
            found.append(empty | {"provisional": _pieces(delta.index, delta.standing)})
        if delta.finish_reason:
            end = self._choice(delta.index, {} if self._is_chat else "") | {"finish_reason": delta.finish_reason}
            found.append(self._chunk([end]))
        return found

    def last(self, usage: dict) -> dict | None:
        """The chunk with the usage, if it is asked for."""
        return self._chunk([]) | {"usage": usage} if self.asked.include_usage else None

    def _choice(self, index: int, content, logprobs: dict | None = None) -> dict:
        name = "delta" if self._is_chat else "text"
        return {"index": index, name: content, "logprobs": logprobs, "finish_reason": None}

    def _call(self, index: int, call: Call) -> dict:
        """A call of choice `index`. No other has its id: the answer's name is drawn."""
        name = f"call_{self.name.rpartition('-')[2]}_{index}_{call.index}"
        return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _chunk(self, choices: list[dict]) -> dict:
        chunk = self._head("chat.completion.chunk" if self._is_chat else "text_completion") | {"choices": choices}
        return chunk | {"usage": None} if self.asked.include_usage else chunk

    def _head(self, kind: str) -> dict:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[Token], index: int) -> dict | None:
        """Of both shapes. The only alternative that may be asked for is the token itself (asked.py)."""
        if self.asked.alternatives is None:
            return None
        own = self.asked.alternatives == 1
        if self._is_chat:
            entries = [{"token": t.text, "logprob": t.logprob, "bytes": list(t.data)} for t in tokens]
            content = [entry | {"top_logprobs": [dict(entry)] if own else []} for entry in entries]
            return {"content": content, "refusal": None}
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{t.text: t.logprob} for t in tokens] if own else None,
            "text_offset": [t.offset + len(self.echoes[index]) for t in tokens],
        }


def _pieces(index: int, pieces: Sequence[tuple[str | None, int]]) -> dict:
    return {"index": index, "pieces": [piece for piece, _ in pieces], "steps": [step for _, step in pieces]}
