"""From what is asked to requests of the engine: prompts as ids, a config, seeds. Blocks: for a thread of its own."""

import dataclasses
import secrets

import numpy as np

from llada_jax.data import chat
from llada_jax.errors import InputError
from llada_jax.sampling.batches.requests import Request
from llada_jax.sampling.generate import GenerateConfig
from llada_jax.serving import refusals
from llada_jax.serving.asked import Asked, Chat, Completion
from llada_jax.serving.refusals import Refused
from llada_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prepared:
    """requests: one for each choice, in their order. echoes: the text before each answer. prompt_tokens: of all
    prompts, each counted once.
    """

    requests: list[Request]
    echoes: list[str]
    prompt_tokens: int


def prepare(asked: Asked, tokenizer: Tokenizer, defaults: GenerateConfig, max_length: int) -> Prepared:
    """The requests that are asked for. defaults: of what is not said. max_length: most tokens of a prompt and answer.

    The seed of a lone answer is the request's, or drawn; choice i of several has the pair (seed, i). Without max_tokens
    an answer may have as many tokens as by default, or as there is room for. Raises Refused (400) naming the field.
    """
    try:
        prompts, echoes = _chat(asked, tokenizer) if isinstance(asked, Chat) else _completion(asked, tokenizer)
        configs = [_config(asked, len(prompt), defaults, max_length) for prompt in prompts]
    except InputError as error:
        raise refusals.of_input(error, set(type(asked).model_fields)) from None
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    alone = len(prompts) * asked.n == 1
    requests = [
        Request(np.asarray(prompt, np.int32), config, seed if alone else (seed, at * asked.n + i))
        for at, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
        for i in range(asked.n)
    ]
    return Prepared(requests, [echo for echo in echoes for _ in range(asked.n)], sum(map(len, prompts)))


def _chat(asked: Chat, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    row = {"messages": asked.messages, "chat_template_kwargs": asked.chat_template_kwargs, "tools": asked.offered}
    return [chat.prompt(row, tokenizer).ids(tokenizer)], [""]


def _completion(asked: Completion, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    prompts = asked.prompts
    ids = [chat.prompt({"prompt": p}, tokenizer).ids(tokenizer) if isinstance(p, str) else p for p in prompts]
    if not asked.echo:
        return ids, [""] * len(ids)
    return ids, [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=True) for p in prompts]


def _config(asked: Asked, prompt_length: int, defaults: GenerateConfig, max_length: int) -> GenerateConfig:
    room = max_length - prompt_length
    if room < (asked.max_tokens or 1):
        raise Refused(
            400, f"{prompt_length} prompt tokens and max_tokens={asked.max_tokens or 1}: at most {max_length} together",
            "max_tokens" if asked.max_tokens and room >= 1 else None, "context_length_exceeded",
        )  # fmt: skip
    length = asked.max_tokens or min(defaults.gen_length, room)
    config = dataclasses.replace(defaults, gen_length=length, **asked.decoding)
    if config.block_length > max_length:  # the batch would be as long
        raise Refused(400, f"block_length={config.block_length}: at most {max_length}", "block_length", "invalid_value")
    if asked.alternatives and config.temperature > 0:
        name = "top_logprobs" if isinstance(asked, Chat) else "logprobs"
        raise Refused(
            400, f"{name}={asked.alternatives} at temperature={config.temperature}: of tokens that are drawn, others "
            "may be more probable, and are not kept", name, "unsupported",
        )  # fmt: skip
    return config
