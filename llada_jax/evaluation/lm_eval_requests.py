"""Translates requests of lm-eval's tasks: decoding settings, contexts that fit, and where an answer ends."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from lm_eval.models.utils import normalize_gen_kwargs

from llada_jax.errors import InputError
from llada_jax.sampling.generate import GenerateConfig
from llada_jax.tokenizer import Tokenizer

_LEAST_SHARE = 8  # a context that is cut must keep at least 1 / 8 of max_length
# Foreign settings that have no effect at these values; any other value is refused.
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "typical_p": 1, "min_p": 0,
    "frequency_penalty": 0, "presence_penalty": 0, "no_repeat_ngram_size": 0, "early_stopping": False,
    "use_cache": True,
}  # fmt: skip
# Our settings that may differ between requests that are decoded together.
_OURS = ("steps", "threshold", "eos_early_stop", "editing_threshold", "max_post_steps", "max_steps_per_block",
         "entropy_bound", "active_blocks", "add_block_threshold", "semi_complete_threshold")  # fmt: skip
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "


def decoding_of(settings: dict, defaults: GenerateConfig) -> tuple[GenerateConfig, list[str]]:
    """Returns (GenerateConfig, stop texts) of a request's generation settings, read by lm-eval's own normaliser.

    defaults: for settings that are not given. Sampling is as in transformers: temperature defaults to 1, and top_k 0 or
    -1 means none. Raises InputError naming a setting that is unknown or out of range.
    """
    try:
        settings = dict(normalize_gen_kwargs(dict(settings), defaults.gen_length))
    except (TypeError, ValueError) as error:
        raise InputError(f"gen_kwargs {settings}: {error}") from error
    length, sampled, temperature = (settings.pop(name, None) for name in ("max_gen_toks", "do_sample", "temperature"))
    temperature = 1.0 if temperature is None else temperature
    if length < 1:
        raise InputError(f"gen_kwargs: max_gen_toks={length}, expected at least 1")
    stops = [stop for stop in [*settings.pop("until"), *_listed(settings.pop("stop", None))] if stop is not None]
    if wrong := [stop for stop in stops if not isinstance(stop, str)]:
        raise InputError(f"gen_kwargs: until={wrong[0]!r}, expected texts")
    changes = {"gen_length": length, "temperature": temperature if sampled else 0.0}
    top_k = settings.pop("top_k", None)
    changes |= {"top_k": None if top_k in (0, -1) else top_k, "top_p": settings.pop("top_p", None)}
    changes |= {name: settings.pop(name) for name in _OURS if name in settings}
    for name, value in settings.items():
        if name not in _NEUTRAL or value not in (None, _NEUTRAL[name]):
            known = "until, stop, max_gen_toks, do_sample, temperature, top_p, top_k, " + ", ".join(_OURS)
            raise InputError(f"gen_kwargs: {name}={value!r} is not for this model; known: {known}")
    try:
        return dataclasses.replace(defaults, **changes), stops
    except InputError as error:
        raise InputError(f"gen_kwargs: {error}") from error


def _listed(value) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def fit(context: Sequence[int], gen_length: int, max_length: int) -> list[int]:
    """The last ids of the context that leave room for the answer, cut as by lm-eval's hf model.

    Raises InputError if so little room is left that the question itself would be cut.
    """
    room = max_length - gen_length
    if room < 1 or (len(context) > room and room * _LEAST_SHARE < max_length):
        raise InputError(
            f"max_gen_toks={gen_length} of max_length={max_length} tokens leaves {max(room, 0)} for a context of "
            f"{len(context)}: set --gen_kwargs max_gen_toks=N, or the model argument max_length"
        )
    return list(context[-room:])


def continued(tokenizer: Tokenizer, messages: Sequence[dict], **variables) -> str:
    """The rendered conversation up to the end of the last message's text, which the model continues.

    As transformers' continue_final_message. Raises InputError if the template does not print that message.
    """
    *before, last = messages
    said = last.get("content")
    if not isinstance(said, str):
        raise InputError("the message to be continued has no text")
    text = tokenizer.apply_chat_template([*before, last | {"content": said + _CONTINUED}], False, **variables)
    end = text.rfind(_CONTINUED.strip())
    if end < 0 or said.strip() not in text:
        raise InputError("the chat template leaves out the message to be continued")
    keeps_blanks = text[end:].startswith(_CONTINUED)  # else the template cut the blanks off
    return text[:end] if keeps_blanks else text[:end].rstrip()


def answer_text(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stops: Iterable[str],
    thought_end: str | None = None,
) -> str:
    """The text that the tokens add to the prompt, up to the first stop text and without special tokens.

    A stop text may contain special tokens. thought_end: only the text after its last occurrence is the answer.
    """
    tokens = [int(token) for token in tokens]
    special = {token: name for token in set(tokens) if (name := tokenizer.text.special(token)) is not None}
    text = tokenizer.decode_after(prompt, tokens)
    parts, shown, end = [], [], 0  # the text with its special tokens, and which of its characters are shown
    for number, token in enumerate(tokens):
        if token in special:
            place = len(tokenizer.decode_after(prompt, tokens[:number]))
            parts += [text[end:place], special[token]]
            shown += [True] * (place - end) + [False] * len(special[token])
            end = place
    written, shown = "".join(parts) + text[end:], shown + [True] * (len(text) - end)
    start = 0
    if thought_end and (place := written.rfind(thought_end)) >= 0:
        start = place + len(thought_end)
        start += len(written[start:]) - len(written[start:].lstrip())
    places = (place for stop in stops if stop and (place := written.find(stop, start)) >= 0)
    end = min(places, default=len(written))
    return "".join(itertools.compress(written[start:end], shown[start:end]))
