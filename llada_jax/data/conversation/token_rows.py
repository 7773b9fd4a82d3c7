"""Rows of token ids, with the tokens that are supervised."""

import numpy as np

from llada_jax.errors import InputError
from llada_jax.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not supervised
_LENGTHS = ("prompt_length", "prompt_lengths")
# Names of a flag for each token: whether it is supervised.
_FLAGS = ("supervised", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "weights")
MASKS = ("labels", "supervised", *_LENGTHS, *_FLAGS[1:])
# Fields that change a row's meaning and are not supported.
_REFUSED = (
    "segment_ids", "sequence_ids", "seq_lengths", "seq_lens", "sequence_lengths", "cu_seqlens", "inputs_embeds",
)  # fmt: skip
COLUMNS = ("input_ids", *MASKS, "attention_mask", "position_ids", "token_type_ids", *_REFUSED)

Spans = list[tuple[int, int]]


def runs(row: dict, tokenizer: Tokenizer) -> tuple[np.ndarray, Spans]:
    """(ids [n] int32 without padding, half-open runs of supervised tokens). Raises InputError naming the field."""
    ids = row["input_ids"]
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise InputError("input_ids is not a list of token ids")
    if ids and tokenizer.id_to_token(max(ids)) is None:
        raise InputError(f"input_ids: the tokenizer has no token {max(ids)}")
    for name in _REFUSED:
        if name in row:
            raise InputError(f"{name} cannot be honoured: a row of input_ids is one document")
    supervised = _mask(row, ids)
    first, last = _unpadded(row, supervised)
    for name, plain in (("position_ids", range(last - first)), ("token_type_ids", [0] * (last - first))):
        if name in row and (not isinstance(row[name], list) or row[name][first:last] != list(plain)):
            raise InputError(f"{name} cannot be honoured: it is not {'0, 1, 2, ...' if plain[1:2] != [0] else '0'}")
    edges = np.flatnonzero(np.diff(supervised[first:last], prepend=False, append=False)).tolist()
    return np.asarray(ids[first:last], np.int32), list(zip(edges[::2], edges[1::2], strict=True))


def documents(ids: np.ndarray, spans: Spans, turns: str) -> list[tuple[np.ndarray, Spans]]:
    """The documents of a row for `turns` of chat.prepare; each ends with its last supervised token."""
    spans = spans[-1:] if turns == "last" else spans
    groups = [[span] for span in spans] if turns == "each" else [spans] if spans else []
    return [(ids[: group[-1][1]], group) for group in groups]


def _unpadded(row: dict, supervised: np.ndarray) -> tuple[int, int]:
    """The half-open range of tokens that are not padding."""
    if "attention_mask" not in row:
        return 0, len(supervised)
    real = _flags("attention_mask", row["attention_mask"], len(supervised))
    real_positions = np.flatnonzero(real)
    first, last = (int(real_positions[0]), int(real_positions[-1]) + 1) if len(real_positions) else (0, 0)
    if not real[first:last].all():
        raise InputError("attention_mask has a 0 between two 1: only padding at the ends can be left out")
    if first and any(name in row for name in _LENGTHS):
        raise InputError("attention_mask pads at the left, where prompt_length counts tokens")
    if (supervised & ~real).any() and not any(name in row for name in _LENGTHS):
        raise InputError("attention_mask is 0 at a token that is supervised")
    return first, last


def _mask(row: dict, ids: list[int]) -> np.ndarray:
    """Which of the ids are supervised, [n] bool."""
    given = [name for name in MASKS if name in row]
    if len(given) != 1:
        fields = " and ".join(given) or "nothing"
        raise InputError(f"input_ids comes with {fields}, expected one of {', '.join(MASKS)}")
    (name,), value = given, row[given[0]]
    if name in _LENGTHS:
        if type(value) is not int or value < 0:
            raise InputError(f"{name} {value!r} is not a number of tokens")
        return np.arange(len(ids)) >= value
    if name in _FLAGS:
        return _flags(name, value, len(ids))
    _check_length(name, value, len(ids))
    if any(label not in (token, IGNORED) for label, token in zip(value, ids, strict=True)):
        raise InputError(f"labels holds something else than {IGNORED} and the token of input_ids at its place")
    return np.asarray([label != IGNORED for label in value], bool)


def _flags(name: str, value, length: int) -> np.ndarray:
    _check_length(name, value, length)
    if not all(type(entry) in (bool, int, float) and entry in (0, 1) for entry in value):
        raise InputError(f"{name} holds something else than true and false")
    return np.asarray(value, bool)


def _check_length(name: str, value, length: int) -> None:
    if not isinstance(value, list) or len(value) != length:
        raise InputError(f"{name} is not a list of {length} entries, as input_ids is")
