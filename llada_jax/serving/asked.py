"""What may be asked: the fields of OpenAI's two kinds of completions that are honoured, and those of decoding.

A field of OpenAI's, or of other servers, that is not honoured is accepted at the value that asks for nothing, since
clients send such values, and refused by name at any other. A null counts as an absent field.
"""

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llada_jax.data.conversation.messages import SAID
from llada_jax.serving.refusals import Refused

MOST_STOPS = 64
MOST_ANSWERS = 128
_ANY_TEXT = object()  # a name for the client's own records
# Fields that are not honoured, and the values of each that ask for nothing.
_NEUTRAL = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "user": (_ANY_TEXT,),
    "repetition_penalty": (1,), "length_penalty": (1,), "min_p": (0,), "min_tokens": (0,), "typical_p": (1,),
    "use_beam_search": (False,), "stop_token_ids": ([],), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "early_stopping": (False,),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
}  # fmt: skip
_NEUTRAL_OF_COMPLETIONS = _NEUTRAL | {"best_of": (1,), "suffix": ("",)}
_NEUTRAL_OF_CHATS = _NEUTRAL | {
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "functions": ([],), "function_call": ("none", "auto"), "parallel_tool_calls": (True,), "reasoning_effort": (),
    "verbosity": ("medium",), "web_search_options": (), "store": (False,), "metadata": ({},),
    "service_tier": ("auto", "default"), "safety_identifier": (_ANY_TEXT,), "prompt_cache_key": (_ANY_TEXT,),
    "prompt_cache_retention": ("in_memory",), "add_generation_prompt": (True,), "continue_final_message": (False,),
}  # fmt: skip
_OF_MESSAGES = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", *SAID}
_NEUTRAL_OF_MESSAGES = {"annotations": ([],)}  # clients send answers back as they came
# Fields that are those of sampling.generate.GenerateConfig.
DECODING = (
    "temperature", "top_p", "top_k", "block_length", "steps", "threshold", "rule", "editing_threshold",
    "max_post_steps", "max_steps_per_block", "entropy_bound", "eos_early_stop", "active_blocks", "add_block_threshold",
    "semi_complete_threshold",
)  # fmt: skip

_Texts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(lambda x: [x] if type(x) is str else x)
]
_Int = Annotated[int, Field(gt=-(2**31), lt=2**31)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(_Fields):
    """The fields of both kinds. Ranges of decoding's own are GenerateConfig's."""

    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: _Texts = Field([], max_length=MOST_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    provisional: bool = False
    ignore_eos: bool = False  # vLLM's name: write max_tokens whatever comes
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = None
    top_k: _Int | None = None
    block_length: _Int | None = None
    steps: _Int | None = None
    threshold: float | None = None
    rule: str | None = None
    editing_threshold: float | None = None
    max_post_steps: _Int | None = None
    max_steps_per_block: _Int | None = None
    entropy_bound: float | None = None
    eos_early_stop: bool | None = None
    active_blocks: _Int | None = None
    add_block_threshold: float | None = None
    semi_complete_threshold: float | None = None

    @property
    def decoding(self) -> dict:
        """Fields of GenerateConfig that are set."""
        found = {name: getattr(self, name) for name in DECODING if getattr(self, name) is not None}
        if self.top_k in (0, -1):  # of other servers: all tokens
            found["top_k"] = None
        return found | ({"eos_id": -1} if self.ignore_eos else {})

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Asked):
    """Of /v1/completions. prompt: a text, ids, or a list of either, in the one form `prompts`."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or _is_ids(self.prompt) else self.prompt

    @property
    def alternatives(self) -> int | None:
        """How many of the most probable tokens are asked for beside each token; None: no probabilities at all."""
        return self.logprobs


class Chat(Asked):
    """Of /v1/chat/completions. messages, tools, chat_template_kwargs: of a row of data/chat.py, which checks them."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)  # the newer name of max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def offered(self) -> list[dict]:
        """The tools that the model is told of, and may call."""
        return self.tools if self.tool_choice == "auto" else []


def read(kind: type[Completion] | type[Chat], body: bytes) -> Completion | Chat:
    """The request in a body. Raises Refused (400) naming the field."""
    fields = {name: value for name, value in _object(body).items() if value is not None}
    if kind is Chat:
        fields = _without_neutral(fields, _NEUTRAL_OF_CHATS)
    else:
        best = {"best_of": (1, fields.get("n", 1))}  # as many as are asked for
        fields = _without_neutral(fields, _NEUTRAL_OF_COMPLETIONS | best)
    try:
        asked = kind(**fields)
    except ValidationError as error:
        raise _refused(error.errors()[0], kind) from None
    _check_chat(asked) if kind is Chat else _check_prompts(asked)
    _check_probabilities(asked)
    for name in ("provisional", "stream_options"):
        if getattr(asked, name) and not asked.stream:
            raise Refused(400, f"{name} is for streams: set stream too", name)
    return asked


def _object(body: bytes) -> dict:
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is not a JSON object", code="invalid_json")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = {}
    for name, value in pairs:
        if name in found:
            raise Refused(400, f"the body is not clear: {_shown(name)} stands there twice", code="invalid_json")
        found[name] = value
    return found


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def _without_neutral(fields: dict, neutral: dict[str, tuple], place: str = "") -> dict:
    """The fields without those that ask for nothing. Raises Refused on one that asks for something else."""
    for name, value in fields.items():
        if name in neutral and not any(_same(value, other) for other in neutral[name]):
            known = ", ".join("a text" if x is _ANY_TEXT else json.dumps(x) for x in neutral[name])
            only = f"only {known} is" if known else "it is not"
            raise Refused(
                400, f"{place}{name}={_shown(value)} cannot be honoured: {only} accepted", place + name, "unsupported"
            )
    return {name: value for name, value in fields.items() if name not in neutral}


def _same(value, neutral) -> bool:
    if neutral is _ANY_TEXT:
        return isinstance(value, str)
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _check_prompts(asked: Completion) -> None:
    prompt = asked.prompt
    if isinstance(prompt, list) and not _is_ids(prompt):
        if not prompt or not (all(isinstance(x, str) for x in prompt) or all(map(_is_ids, prompt))):
            raise Refused(400, "prompt: expected a text, a list of texts, token ids, or a list of token ids", "prompt")
    elif not isinstance(prompt, str) and not _is_ids(prompt):
        raise Refused(400, f"prompt={_shown(prompt)}: expected a text, token ids, or a list of either", "prompt")
    if len(asked.prompts) * asked.n > MOST_ANSWERS:
        raise Refused(400, f"{len(asked.prompts)} prompts and n={asked.n}: at most {MOST_ANSWERS} answers", "prompt")
    if asked.echo and asked.logprobs is not None:
        raise Refused(
            400, "logprobs with echo: decoding gives prompts no likelihood; llada_jax.evaluation.lm_eval does",
            "logprobs", "unsupported",
        )  # fmt: skip


def _is_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and 0 <= x < 2**31 for x in value)


def _check_chat(asked: Chat) -> None:
    newer = asked.max_completion_tokens
    if newer and asked.max_tokens not in (None, newer):
        raise Refused(400, "max_tokens and max_completion_tokens differ", "max_completion_tokens")
    asked.max_tokens = newer or asked.max_tokens
    for i, message in enumerate(asked.messages):
        message = {name: value for name, value in message.items() if value is not None}
        asked.messages[i] = message = _without_neutral(message, _NEUTRAL_OF_MESSAGES, f"messages[{i}].")
        if unknown := sorted(message.keys() - _OF_MESSAGES):
            raise Refused(400, f"messages[{i}]: unknown field {_shown(unknown[0])}", f"messages[{i}]", "unknown_field")
        if not isinstance(message.get("role"), str):
            raise Refused(400, f"messages[{i}]: role is {'no text' if 'role' in message else 'missing'}", "messages")
    for i, tool in enumerate(asked.tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name.strip():
            raise Refused(400, f"tools[{i}]: no function with a name", "tools", "invalid_value")
    if asked.top_logprobs and not asked.logprobs:
        raise Refused(400, "top_logprobs is for logprobs: set logprobs too", "top_logprobs")


def _check_probabilities(asked: Completion | Chat) -> None:
    """Only the probability of the token that was written is known. Where nothing is drawn, it is the most probable."""
    name = "logprobs" if isinstance(asked, Completion) else "top_logprobs"
    if (asked.alternatives or 0) > 1:
        raise Refused(400, f"{name}={asked.alternatives}: at most 1, no others are kept", name, "unsupported")


def _refused(error: dict, kind: type[Asked]) -> Refused:
    """Of a pydantic error."""
    field = _place(error["loc"])
    if error["type"] == "missing":
        return Refused(400, f"{field} is required", field, "missing_field")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), kind.model_fields, 1, 0.8)
        hint = f"; did you mean {near[0]}?" if near else ""
        return Refused(400, f"unknown field {_shown(str(error['loc'][-1]))}{hint}", field, "unknown_field")
    expected = error["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return Refused(400, f"{field}={_shown(error['input'])}: {expected}", field, "invalid_value")


def _place(loc: tuple) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:100]


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
