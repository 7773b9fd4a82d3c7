"""The model class of lm-eval (EleutherAI's harness), so that its tasks run on our checkpoints; pip: [lm-eval].

    python -m llada_jax.evaluation.lm_eval run --model llada_jax --tasks TASK \\
        --model_args checkpoint=DIR,block_length=32,samples=16

is lm-eval's own command with the model registered. Likelihoods are estimates of the NELBO of the continuation given the
context, by `samples` stratified draws, or exact with likelihood_block=1 or likelihood_block=ar.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llada_jax.data.order import Batch
from llada_jax.errors import InputError
from llada_jax.evaluation import likelihood
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import GenerateConfig
from llada_jax.training.checkpoint import load_checkpoint

_SHORTEST = 64  # rows are padded to this or a power of two times it, so that few shapes are compiled


@register_model("llada_jax")
class LLaDAJax(TemplateLM):
    """A checkpoint, converted or of a run, with a tokenizer.

    likelihood_block: block size of the NELBO, "full" (MDLM over the sequence) or "ar" (the causal pass of these
    weights). Contexts are cut on the left so that nothing exceeds max_length tokens. A continuation counts as greedy
    when every token of it is the most probable one with its whole block masked: at block size 1 what greedy AR
    decoding writes, at larger ones what decoding in one pass a block does. Raises InputError.
    """

    def __init__(
        self, checkpoint: str, likelihood_block: int | str = 32, samples: int = 16, max_length: int = 2048,
        gen_length: int = 256, block_length: int = 32, steps: int = 32, threshold: float = 0.95, batch_size: int = 8,
        seed: int = 0, **_,
    ):  # fmt: skip
        super().__init__()
        if likelihood_block not in ("full", "ar") and not (isinstance(likelihood_block, int) and likelihood_block > 0):
            raise InputError(f'likelihood_block={likelihood_block!r}, expected a block size, "full" or "ar"')
        self._model = load_checkpoint(checkpoint)
        if self._model.tokenizer is None or self._model.tokenizer.eos_id is None:
            raise InputError(f"{checkpoint}: no tokenizer with an end of sequence")
        self._block, self._draws, self._max_length = likelihood_block, likelihood.Draws(int(samples)), int(max_length)
        self._decoding = dict(block_length=int(block_length), steps=int(steps), threshold=float(threshold))
        self._gen_length, self._rows, self._seed = int(gen_length), int(batch_size), int(seed)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer.digest

    def tok_encode(self, string: str, **_) -> list[int]:
        return self._model.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self._model.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in windows of max_length tokens, the first after an end of sequence."""
        windows, texts = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self._max_length - 1, 1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(number)
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(texts, scores, len(requests)).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is greedy) of each (…, context ids, continuation ids)."""
        found: list = [None] * len(requests)
        rows = [self._cut(context, continuation) for _, context, continuation in requests]
        for shape in sorted({_padded(len(ids)) for ids, _ in rows}):
            chosen = [i for i, (ids, _) in enumerate(rows) if _padded(len(ids)) == shape]
            batch = _batch([rows[i] for i in chosen], chosen, shape)
            for i, answer in zip(chosen, self._score(batch), strict=True):
                found[i] = answer
        return found

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        """(ids, number of them that are the continuation), the context cut on the left."""
        if len(continuation) >= self._max_length:
            raise InputError(f"max_length={self._max_length}: a continuation has {len(continuation)} tokens")
        ids = [*context, *continuation][-self._max_length :]
        return ids, len(continuation)

    def _score(self, batch: Batch) -> Iterable[tuple[float, bool]]:
        model, rows = self._model, self._rows
        size = None if self._block == "full" else self._block
        if size == "ar":
            values, _ = likelihood.row_ar_nll(model.params, model.config, batch, rows_at_once=rows)
        else:
            values, _ = likelihood.row_nelbo(
                model.params, model.config, batch, size, self._draws, seed=self._seed, rows_at_once=rows
            )
        greedy = likelihood.predicted_at_once(model.params, model.config, batch, size, rows_at_once=rows)
        return zip((-values.mean(1)).tolist(), greedy.tolist(), strict=True)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the request's `until` texts."""
        asked, stops = [], []
        for number, request in enumerate(requests):
            context, settings = request.args
            length = settings.get("max_gen_toks", self._gen_length)
            sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
            config = GenerateConfig(
                length, temperature=settings.get("temperature", 1.0) if sampled else 0.0, **self._decoding
            )
            ids = self.tok_encode(context)[-max(1, self._max_length - length) :]
            asked.append(Request(np.asarray(ids, np.int32), config, self._seed + number))
            until = settings.get("until") or []
            stops.append([until] if isinstance(until, str) else until)
        if not asked:
            return []
        longest = max(len(request.prompt) + request.config.gen_length for request in asked)
        texts = [""] * len(asked)
        model, rows = self._model, min(self._rows, len(asked))
        for answer in serve(model.params, model.config, asked, rows, longest, model.tokenizer):
            texts[answer.index] = _before(answer.text, stops[answer.index])
        return texts


def _padded(length: int) -> int:
    size = _SHORTEST
    while size < length:
        size *= 2
    return size


def _batch(rows: Sequence[tuple[list[int], int]], numbers: Sequence[int], length: int) -> Batch:
    """Rows of (ids, number of continuation tokens), padded; their noise is that of their numbers."""
    ids, segment_ids = np.zeros((2, len(rows), length), np.int32)
    supervised = np.zeros(ids.shape, bool)
    for row, (tokens, count) in enumerate(rows):
        ids[row, : len(tokens)], segment_ids[row, : len(tokens)] = tokens, 1
        supervised[row, len(tokens) - count : len(tokens)] = True
    return Batch(ids, segment_ids, supervised, np.asarray(numbers, np.uint32), np.zeros(len(rows), np.uint32))


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
