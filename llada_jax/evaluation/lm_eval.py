"""The model class for lm-eval (EleutherAI's harness), whose tasks then run on our checkpoints; pip: [lm-eval].

    python -m llada_jax.evaluation.lm_eval run --model llada_jax --tasks TASK \\
        --model_args checkpoint=DIR,block_length=32,samples=16

is lm-eval's own command with the model registered. Likelihoods are estimates of the continuation's NELBO given the
context, from `samples` stratified draws; with likelihood_block=1 or likelihood_block=ar they are exact.
"""

import contextlib
import difflib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence

if __name__ == "__main__":  # a wrong flag is refused here: the imports below take seconds
    with contextlib.suppress(ModuleNotFoundError):
        from lm_eval.__main__ import HarnessCLI

        HarnessCLI().parse_args()

import jax
import numpy as np

from llada_jax import errors
from llada_jax.checkpoint.weights import load_checkpoint
from llada_jax.data import chat
from llada_jax.data.order import Batch
from llada_jax.errors import InputError
from llada_jax.evaluation import likelihood
from llada_jax.model.forward import Execution
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import GenerateConfig, prefill_execution

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from llada_jax.evaluation import lm_eval_requests
except ModuleNotFoundError as error:
    missing = InputError(f"lm-eval is not installed (no {error.name}): pip install -e '.[lm-eval]'")
    if __name__ == "__main__":
        sys.exit(errors.report(missing))
    raise missing from error

_SHORTEST = 64  # rows are padded to this or a power of two times it, so that few shapes are compiled
_IGNORED = {"device", "trust_remote_code"}  # lm-eval gives them to every model; JAX_PLATFORMS chooses the device
_log = logging.getLogger("lm_eval.models.llada_jax")


@register_model("llada_jax")
class LLaDAJax(TemplateLM):
    """A checkpoint with a tokenizer, imported or of a run.

    likelihood_block: block size of the NELBO, "full" (MDLM over the sequence) or "ar" (a causal pass).
    max_length: most tokens of a context plus its continuation or answer; by default the model's maximum. Contexts are
    cut on the left to fit, which is logged. gen_length: most tokens of an answer, if the task does not say.
    block_length to eos_early_stop: as in GenerateConfig. batch_size: rows at once; "auto": max_batch_size, halved while
    the device runs out of memory. add_bos (or add_bos_token): auto, true or false; by default as in training.
    prefix_token_id: of empty contexts; by default the beginning of sequence, else the end of sequence.
    think_end_token: text or id that ends the reasoning; the answer is what follows. enable_thinking, chat_template_args
    (JSON): variables of the chat template.

    A continuation counts as greedy if every token is the most probable one when its whole block is masked. At block
    size 1 that is greedy AR decoding; at larger ones it is decoding with one pass per block. Raises InputError, also on
    unknown arguments.
    """

    def __init__(
        self, checkpoint: str | None = None, likelihood_block: int | str = 32, samples: int = 16,
        max_length: int | None = None, gen_length: int = 256, block_length: int = 32, steps: int = 32,
        threshold: float = 0.95, rule: str = "llada2", editing_threshold: float = 0.5, max_post_steps: int = 16,
        max_steps_per_block: int = 1000, entropy_bound: float = 0.15, active_blocks: int = 1,
        add_block_threshold: float = 0.1, semi_complete_threshold: float = 0.9, eos_early_stop: bool = False,
        batch_size: int | str = 8, max_batch_size: int | None = None, seed: int = 0,
        add_bos: str | bool | None = None, add_bos_token: str | bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None, enable_thinking: bool | None = None,
        chat_template_args: str | dict | None = None, **others,
    ):  # fmt: skip
        super().__init__()
        _refuse(set(others) - _IGNORED)
        if checkpoint is None:
            raise InputError("the model argument checkpoint=DIR is required")
        if likelihood_block not in ("full", "ar") and not (isinstance(likelihood_block, int) and likelihood_block > 0):
            raise InputError(f'likelihood_block={likelihood_block!r}, expected a block size, "full" or "ar"')
        self._block, self._draws = likelihood_block, likelihood.Draws(_whole("samples", samples))
        self._decoding = GenerateConfig(
            gen_length=gen_length, block_length=block_length, steps=steps, threshold=threshold, rule=rule,
            editing_threshold=editing_threshold, max_post_steps=max_post_steps,
            max_steps_per_block=max_steps_per_block, entropy_bound=entropy_bound, active_blocks=active_blocks,
            add_block_threshold=add_block_threshold, semi_complete_threshold=semi_complete_threshold,
            eos_early_stop=eos_early_stop,
        )  # fmt: skip
        self._rows, self._auto = _rows(batch_size, max_batch_size)
        self._seed = _whole("seed", seed, 0)
        self._variables = _variables(enable_thinking, chat_template_args)
        self._model = load_checkpoint(str(checkpoint))
        self._tokenizer = self._model.tokenizer
        if self._tokenizer is None or self._tokenizer.eos_id is None:
            raise InputError(f"{checkpoint}: no tokenizer with an end of sequence")
        if add_bos is not None or add_bos_token is not None:
            self._tokenizer = self._tokenizer.with_bos(add_bos_token if add_bos is None else add_bos)
        self._max_length = self._model.config.max_position_embeddings
        if max_length is not None:
            self._max_length = _whole("max_length", max_length, 2)
        self._prefix = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
        if prefix_token_id is not None:
            self._prefix = self._known_id("prefix_token_id", prefix_token_id)
        self._thought_end = think_end_token
        if isinstance(think_end_token, int) or str(think_end_token).isdigit():
            self._thought_end = self._tokenizer.id_to_token(self._known_id("think_end_token", int(think_end_token)))

    def _known_id(self, name: str, value: int) -> int:
        if not isinstance(value, int) or self._tokenizer.id_to_token(value) is None:
            raise InputError(f"{name}={value!r}, expected the id of a token")
        return value

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._decoding.gen_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text from its beginning; without a beginning of sequence if add_special_tokens is False."""
        return (
            self._tokenizer.encode(string) if add_special_tokens is False else self._tokenizer.encode_document(string)
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that apply_chat_template uses, for lm-eval's record. Raises InputError on a name."""
        if isinstance(chat_template, str) and chat_template != "default":
            raise InputError(f"--apply_chat_template {chat_template}: templates are not chosen by name here")
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt, its last message is left open to be continued.

        Raises InputError if the template leaves out something before the answer.
        """
        before = list(chat_history if add_generation_prompt else chat_history[:-1])
        asked = chat.prompt({"messages": before, "chat_template_kwargs": self._variables}, self._tokenizer).text
        if add_generation_prompt:
            return asked
        return lm_eval_requests.continued(self._tokenizer, chat_history, **self._variables)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in windows of max_length tokens, the first after the prefix token."""
        windows, texts = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self._prefix, self._max_length - 1, 1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(number)
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(texts, scores, len(requests)).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is greedy) of each (…, context ids, continuation ids)."""
        scores: list = [None] * len(requests)
        rows = [self._cut(context, continuation) for _, context, continuation in requests]
        cut = sum(len(context) + count > len(ids) for (_, context, _), (ids, count) in zip(requests, rows, strict=True))
        if cut:
            _log.warning("%d of %d contexts are cut on the left to max_length=%d", cut, len(rows), self._max_length)
        for shape in sorted({_padded(len(ids)) for ids, _ in rows}):
            chosen = [i for i, (ids, _) in enumerate(rows) if _padded(len(ids)) == shape]
            batch = _batch([rows[i] for i in chosen], chosen, shape)
            answers = self._attempt(lambda at_once, batch=batch: self._score(batch, min(at_once, len(batch.ids))))
            for i, answer in zip(chosen, answers, strict=True):
                scores[i] = answer
        return scores

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        """Returns (ids, number of continuation ids), with the context cut on the left."""
        if len(continuation) >= self._max_length:
            raise InputError(f"max_length={self._max_length}: a continuation has {len(continuation)} tokens")
        ids = [*context, *continuation][-self._max_length :]
        return ids, len(continuation)

    def _score(self, batch: Batch, rows: int) -> list[tuple[float, bool]]:
        params, config = self._model.params, self._model.config
        size = None if self._block == "full" else self._block
        shared = {"rows_at_once": rows, "execution": Execution("blockwise" if batch.ids.shape[1] > 1024 else "dense")}
        if size == "ar":
            values, _ = likelihood.row_ar_nll(params, config, batch, **shared)
        else:
            values, _ = likelihood.row_nelbo(params, config, batch, size, self._draws, seed=self._seed, **shared)
        greedy = likelihood.predicted_at_once(params, config, batch, size, **shared)
        return [*zip((-values.mean(1)).tolist(), greedy.tolist(), strict=True)]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the request's `until` texts."""
        asked, stops, cut = [], [], 0
        for number, request in enumerate(requests):
            context, settings = request.args
            config, until = lm_eval_requests.decoding_of(settings, self._decoding)
            ids = self.tok_encode(context) or [self._prefix]
            fitting = lm_eval_requests.fit(ids, config.gen_length, self._max_length)
            cut += len(fitting) < len(ids)
            asked.append(Request(np.asarray(fitting, np.int32), config, (self._seed, number)))
            stops.append(until)
        if not asked:
            return []
        if cut:
            _log.warning(
                "%d of %d contexts are cut on the left: with max_gen_toks they exceed max_length=%d",
                cut, len(asked), self._max_length,
            )  # fmt: skip
        tokens = self._attempt(lambda rows: self._generate(asked, rows))
        return [
            lm_eval_requests.answer_text(self._tokenizer, request.prompt, ids, until, self._thought_end)
            for request, ids, until in zip(asked, tokens, stops, strict=True)
        ]

    def _generate(self, asked: Sequence[Request], rows: int) -> list[np.ndarray]:
        longest = max(len(request.prompt) + request.config.gen_length for request in asked)
        execution = prefill_execution(max(len(request.prompt) for request in asked))
        tokens: list = [None] * len(asked)
        params, config = self._model.params, self._model.config
        for answer in serve(params, config, asked, min(rows, len(asked)), longest, execution=execution):
            tokens[answer.index] = answer.tokens
        return tokens

    def _attempt(self, run: Callable[[int], list]) -> list:
        """Returns run(rows at once). With batch_size=auto, the rows are halved while the device runs out of memory."""
        while True:
            try:
                return run(self._rows)
            except jax.errors.JaxRuntimeError as error:
                if not self._auto or self._rows == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            self._rows //= 2
            _log.warning("batch_size=auto: out of memory, going on with %d", self._rows)


def _refuse(unknown: set[str]) -> None:
    if not unknown:
        return
    name, *_ = sorted(unknown)
    known = [*inspect.signature(LLaDAJax.__init__).parameters][1:-1]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"unknown model argument {name}: {hint}known are {', '.join(known)}")


def _whole(name: str, value, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InputError(f"{name}={value!r}, expected an integer of at least {least}")
    return value


def _rows(batch_size: int | str, max_batch_size: int | None) -> tuple[int, bool]:
    """(rows at once, whether they may be reduced) from lm-eval's --batch_size: a number, "auto" or "auto:N"."""
    name, colon, times = str(batch_size).partition(":")
    if name == "auto" and (not colon or times.isdigit()):
        most = 8 if jax.default_backend() == "cpu" else 64  # a CPU does not say when its memory is used up
        return most if max_batch_size is None else _whole("max_batch_size", max_batch_size), True
    if isinstance(batch_size, str) and not batch_size.isdigit():
        raise InputError(f"batch_size={batch_size!r}, expected a number or auto")
    return _whole("batch_size", int(batch_size) if isinstance(batch_size, str) else batch_size), False


def _variables(enable_thinking: bool | None, given: str | dict | None) -> dict:
    """Variables of the chat template. Raises InputError."""
    try:
        variables = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError as error:
        raise InputError(f"chat_template_args={given!r}: malformed JSON ({error})") from error
    if not isinstance(variables, dict):
        raise InputError(f"chat_template_args={given!r}, expected a JSON object")
    return variables if enable_thinking is None else variables | {"enable_thinking": enable_thinking}


def _padded(length: int) -> int:
    size = _SHORTEST
    while size < length:
        size *= 2
    return size


def _batch(rows: Sequence[tuple[list[int], int]], numbers: Sequence[int], length: int) -> Batch:
    """A Batch of (ids, number of continuation tokens), padded to `length`; `numbers` are the row ids of the noise."""
    ids, segment_ids = np.zeros((2, len(rows), length), np.int32)
    supervised = np.zeros(ids.shape, bool)
    for row, (tokens, count) in enumerate(rows):
        ids[row, : len(tokens)], segment_ids[row, : len(tokens)] = tokens, 1
        supervised[row, len(tokens) - count : len(tokens)] = True
    return Batch(ids, segment_ids, supervised, np.asarray(numbers, np.uint32), np.zeros(len(rows), np.uint32))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(errors.report(error))
