"""Extracts what an answer says and compares it with the expected answer."""

import decimal
import re
import unicodedata

from llada_jax.errors import InputError

_GROUPED = r"[1-9]\d{0,2}(?:([,'’_])\d{3})(?:\1\d{3})*"  # with separators of thousands
# A whole number that is not part of a word, of a decimal fraction or of a longer number.
_NUMBER = re.compile(rf"(?<![A-Za-z0-9_])(?<!\d[.,])(?:{_GROUPED}|\d+)(?![A-Za-z0-9_])(?![.,]\d)")
_VALUE = re.compile(rf"[-+]?(?:{_GROUPED}|0|[1-9]\d*)(?:\.\d*)?")
_SEPARATORS = str.maketrans("", "", ",'’_")
_BLANKS = str.maketrans(dict.fromkeys("\u00a0\u2007\u2009\u202f", ",") | {"\u2212": "-"})


def compiled(pattern: str, name: str) -> re.Pattern:
    """Compiles a pattern. Raises InputError with its name if it is not a regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{name}={pattern!r}: {error}") from error


def extracted(answer: str, find: re.Pattern | None) -> str | None:
    """The part of an answer that counts, stripped: all of it, or the group of the last match of `find` that took part.

    That is the first non-empty group, or the whole match without groups. None if nothing matches.
    """
    if find is None:
        return answer.strip()
    last = None
    for match in find.finditer(answer):
        groups = match.groups() or (match.group(),)
        last = next((group for group in groups if group), "" if "" in groups else last)
    return None if last is None else last.strip()


def same(said: str | None, expected: str) -> bool:
    """Whether an answer equals the expected one. Blanks at the ends, a full stop, and how a number is written (1,234 or
    1234, 42.0 or 42) are ignored. None equals nothing.
    """
    if said is None:
        return False
    said, expected = said.strip(), expected.strip()
    if said == expected or not said or not expected:
        return said == expected
    said, expected = _without_stop(said), _without_stop(expected)
    if said == expected:
        return True
    values = _value(said), _value(expected)
    return None not in values and values[0] == values[1]


def numbers_in(text: str) -> set[str]:
    """The whole numbers in a text, as digits without separators."""
    return {match.group().translate(_SEPARATORS) for match in _NUMBER.finditer(_plain(text))}


def _without_stop(text: str) -> str:
    return text[:-1].rstrip() if len(text) > 1 and text[-1] in ".。" and text[-2] != "." else text


def _value(text: str) -> decimal.Decimal | None:
    text = _plain(text)
    return decimal.Decimal(text.translate(_SEPARATORS)) if _VALUE.fullmatch(text) else None


def _plain(text: str) -> str:
    """The text with plain digits for full-width ones, and commas for narrow blanks, which also separate thousands."""
    return unicodedata.normalize("NFKC", text.translate(_BLANKS))
