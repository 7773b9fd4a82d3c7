"""The text of tokens inside a longer text: the bytes of each token, and an answer after its prompt.

Decoders treat their input as the beginning of a text: SentencePiece-like ones remove a space. So the tokens after a
prompt must not be decoded alone. Decoding also does not show the bytes of a token that holds part of a character.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXT = 8  # tokens of the prompt that other decoders see before an answer; earlier ones have no effect on it


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE uses for each byte (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class TokenText:
    """Text and bytes of a backend's tokens. Special tokens and unknown ids have none.

    named: ids that are special although the backend does not say so, such as an end of sequence that is not an added
    token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, named: Iterable[int] = ()):
        self._backend = backend
        self._special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special |= {i: backend.id_to_token(i) for i in named}
        decoder = json.loads(backend.to_str())["decoder"]
        spell = _spelling(decoder)
        self._spell = None if spell is None else functools.cache(lambda i: self._own(i, spell))

    def __reduce__(self):  # for processes that tokenise: the cache is not copied
        return TokenText, (self._backend, tuple(self._special))

    def _own(self, token_id: int, spell: Callable[[str], bytes]) -> bytes:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        return b"" if token is None else spell(token)

    @functools.cached_property
    def begins_with(self) -> int:
        """Bytes that encoding adds before a text: the space before the first word in SentencePiece-like tokenizers."""
        ids = self._backend.encode("a", add_special_tokens=False).ids
        return 0 if self._spell is None else max(sum(len(self._spell(i)) for i in ids) - 1, 0)

    def count_bytes(self, ids: Sequence[int], chosen: Sequence[bool], begins: bool) -> int:
        """UTF-8 bytes of the `chosen` ones of consecutive tokens. begins: the tokens begin a text.

        A token of byte-level BPE or byte fallback has its own bytes, even parts of characters. A SentencePiece token
        has a space per "▁", except the one that encoding adds before the first word. Any other token has what it adds
        to the text before it.
        """
        ids = [int(i) for i in ids]
        if self._spell is None:
            sizes = [0, *(len(self._decode(ids[: stop + 1]).encode()) for stop in range(len(ids)))]
            return sum(sizes[i + 1] - sizes[i] for i, counted in enumerate(chosen) if counted)
        total = sum(len(self._spell(i)) for i, counted in zip(ids, chosen, strict=True) if counted)
        first = next((at for at, i in enumerate(ids) if self._spell(i)), None)
        return total - self.begins_with if begins and first is not None and chosen[first] else total

    def text_after(self, before: Sequence[int], ids: Sequence[int], skip_special: bool = True) -> str:
        """What `ids` add to the text of the ids `before` them: the text of both minus that of `before`.

        skip_special=False writes special tokens out. A character that `ids` leave incomplete becomes U+FFFD; one that
        `before` leaves incomplete is completed.
        """
        ids = [int(i) for i in ids]
        if self._spell is None:
            return self._in_context(before, ids, skip_special)
        end = self._bytes_before_end(before)
        begins = not end and not any(i in self._special and not skip_special for i in before)
        spelled = (self._special[i].encode() if i in self._special and not skip_special else self._spell(i)
                   for i in ids)  # fmt: skip
        text = (_incomplete(end) + b"".join(spelled)).decode("utf-8", "replace")
        return text[self._strips :] if begins and text.startswith(" ") else text

    def piece(self, before: Sequence[int], token_id: int) -> str:
        """One token after those `before` it, for display: a special token by name, part of a character as U+FFFD."""
        name = self._special.get(int(token_id))
        if name is not None or self._spell is None:
            return self._in_context(before, [int(token_id)], name is None)
        return self._spell(int(token_id)).decode("utf-8", "replace")

    def special(self, token_id: int) -> str | None:
        """The name of a special token; None if it is none."""
        return self._special.get(int(token_id))

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of one token inside a text; None where they depend on its neighbours."""
        return None if self._spell is None else self._spell(int(token_id))

    def settled(self, before: Sequence[int], ids: Sequence[int]) -> int:
        """How many of `ids` have text after `before` that no later token can change: text_after of them, and then of
        the others behind them, join to text_after of all.
        """
        ids = [int(i) for i in ids]
        if self._spell is None:
            whole = (
                n for n in range(len(ids), 0, -1) if not self._in_context(before, ids[:n], True).endswith("\ufffd")
            )
            return next(whole, 0)
        end, count = self._bytes_before_end(before), len(ids)
        text = end + b"".join(map(self._spell, ids[:count]))
        while count and _incomplete(text):
            count -= 1
            text = text[: len(text) - len(self._spell(ids[count]))]
        return count

    @functools.cached_property
    def _strips(self) -> int:
        """Spaces that decoding removes from the beginning of a text, at most."""
        ids = self._backend.encode(" a", add_special_tokens=False).ids
        return len(b"".join(map(self._spell, ids))) - len(self._decode(ids))

    def _decode(self, ids: list[int], skip_special: bool = True) -> str:
        shown = [i for i in ids if not (skip_special and i in self._special)]
        return self._backend.decode(shown, skip_special_tokens=skip_special)

    def _bytes_before_end(self, ids: Sequence[int]) -> bytes:
        """The last bytes of the text of `ids`, enough for an incomplete character; b"" if there is no text."""
        end = b""
        for i in reversed(ids):
            end = self._spell(int(i)) + end
            if len(end) >= 4:
                break
        return end

    def _in_context(self, before: Sequence[int], ids: list[int], skip_special: bool) -> str:
        """Decodes twice, after the last _CONTEXT tokens of `before` that have text; earlier ones have no effect."""
        start, left = len(before), _CONTEXT
        while start and left:
            start -= 1
            left -= int(before[start]) not in self._special
        context = [int(i) for i in before[start:]]
        prompt, whole = (self._decode(each, skip_special) for each in (context, context + ids))
        return whole[len(os.path.commonprefix([prompt, whole])) :]


def _spelling(decoder: dict | None) -> Callable[[str], bytes] | None:
    """How a decoder spells a token inside a text; None if that depends on its neighbours."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
        return lambda token: _byte_level(token, bytes_of)
    replacements = []
    for at, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(old) == 1:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replacements.append((old, " "))
            case {"type": "Strip", "stop": 0} if "Fuse" in kinds[:at]:  # of the text, not of each token
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                return None
    if not replacements and "ByteFallback" not in kinds:
        return None

    def spell(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return spell


def _byte_level(token: str, bytes_of: dict[str, int]) -> bytes:
    try:
        return bytes(bytes_of[character] for character in token)
    except KeyError:  # an added token
        return token.encode()


def _incomplete(text: bytes) -> bytes:
    """The bytes of an incomplete UTF-8 character at the end of `text`."""
    for size in range(1, min(3, len(text)) + 1):
        first = text[-size]
        if first >= 0xC0:
            needed = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return text[-size:] if size < needed else b""
        if first < 0x80:
            break
    return b""
