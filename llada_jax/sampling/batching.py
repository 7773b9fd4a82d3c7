"""Continuous batching: each row of a batch decodes its own request, and when it has finished takes the next one.

`Batch` is driven from outside: admit, cancel, step. `serve` takes requests from an iterator and yields answers.

The device runs `admit_every` passes over the batch, then the host collects and admits. A long prompt is computed in
chunks, one between two passes, so that the rows that decode go on meanwhile. An answer depends on its request alone:
not on the rest of the batch, nor on when it was admitted.
"""

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.parameters import Params
from llada_jax.sampling import decode, several_blocks
from llada_jax.sampling.batches.admission import Running, admit, fill
from llada_jax.sampling.batches.prefixes import Prefixes
from llada_jax.sampling.batches.requests import Answer, Request, Usage, check
from llada_jax.sampling.cost import second_block_price
from llada_jax.sampling.generate import (
    GenerateConfig,
    collect,
    cut,
    decode_settings,
    eos_ids_of,
)
from llada_jax.sampling.prefill import is_long, num_passes
from llada_jax.sampling.quantize import has_int8_experts
from llada_jax.sampling.state import PREFILL_CHUNK, DecodeSettings, State, Written, empty_state, with_slots
from llada_jax.tokenizer import Tokenizer


class Progress(NamedTuple):
    """What a step has brought, by the numbers of requests: Written of arrays [tokens].

    new: what finished blocks add to an answer, the rest of `answers` included; passes: for those, (prefill, denoising,
    commit) passes of the request so far, as in Answer. standing: of the requests asked for that
    go on, the blocks that are being written, without what is prompt in them; where nothing is written yet stand the
    mask, step -1 and probability 0.
    """

    answers: list[Answer]
    new: dict[int, Written]
    standing: dict[int, Written]
    passes: dict[int, tuple[int, int, int]]


class Batch:
    """`rows` requests that decode together. Not for several threads at once.

    Arguments are as in `serve`. prefixes: keys and values of earlier prompts, for those that are computed in chunks;
    answers are the same without.

    Example:
        >>> import llada_jax
        >>> from llada_jax.sampling.batching import Batch
        >>> model = llada_jax.load_checkpoint("checkpoint")
        >>> batch = Batch(model.params, model.config, rows=2, max_length=16)
        >>> settings = llada_jax.GenerateConfig(gen_length=8, block_length=8, steps=2)
        >>> batch.admit(0, llada_jax.Request(model.tokenizer.encode("def f("), settings))
        >>> answers = []
        >>> while not answers:
        ...     answers = batch.step().answers
        >>> answers[0].index, batch.free
        (0, 2)
    """

    def __init__(
        self, params: Params, config: ModelConfig, rows: int, max_length: int, tokenizer: Tokenizer | None = None,
        admit_every: int = 8, execution: Execution = Execution(), fuse_share: float | None = None,
        usage: Usage | None = None, prefill_chunk: int = PREFILL_CHUNK, history: bool | int = False,
        prefixes: Prefixes | None = None,
    ):  # fmt: skip
        if rows < 1 or admit_every < 1:
            raise InputError(f"rows={rows}, admit_every={admit_every}, expected at least 1")
        self.rows, self.usage = rows, Usage() if usage is None else usage
        self._params, self._config = decode.loop_weights(params, config, execution), config
        self._max_length, self._admit_every, self._tokenizer = max_length, admit_every, tokenizer
        self._prefixes, self._fuse_share, self._how = prefixes, fuse_share, (execution, prefill_chunk, history)
        self.clear()

    def clear(self) -> None:
        """Forgets all requests, and what they had to share."""
        self._state: State | None = None
        self._running: dict[int, Running] = {}  # by row
        self._new: dict[int, Running] = {}  # those of `_running` that the device does not know yet
        self._filling: dict[int, Running] = {}  # those whose prompts are being computed in chunks

    @property
    def free(self) -> int:
        """Rows without a request."""
        return self.rows - len(self._running)

    def check(self, request: Request) -> np.ndarray:
        """Returns the prompt, int32. Raises InputError if the request could not run even alone; ValueError on a bad
        prompt.
        """
        prompt = check(self._config, None, request, self._max_length)
        settings = decode_settings(self._config, [request.config], *self._how)
        if settings.slots > 1:
            several_blocks.check_kernel(self._config, settings, self.rows)
        return prompt

    def fits(self, config: GenerateConfig) -> bool:
        """Whether a request with this config could join; after `clear`, any that `check` passes."""
        try:
            self._settings(config)
        except InputError:
            return False
        return True

    def admit(self, index: int, request: Request) -> None:
        """Gives a free row to a request. index: a number that no other one has. Raises InputError if it does not
        pass `check` or does not fit; the others go on.
        """
        run = Running(index, request, check(self._config, index, request, self._max_length))
        self._settings(request.config)
        row = next(row for row in range(self.rows) if row not in self._running)
        self._running[row] = self._new[row] = run

    def cancel(self, index: int) -> None:
        """Frees the row of a request, which takes part in no further pass. Does nothing if there is none."""
        for row in [row for row, run in self._running.items() if run.index == index]:
            del self._running[row]
            self._filling.pop(row, None)
            if self._new.pop(row, None) is None:
                finished = self._state.finished | (np.arange(self.rows) == row)
                self._state = self._state.replace(finished=finished)

    def step(self, passes: int | None = None, new: bool = True, standing: Container[int] = ()) -> Progress:
        """Prefills new requests, or the next chunk of a long prompt, and runs passes over the batch: admit_every unless
        told, one while a prompt is computed in chunks. new: whether to tell of Progress.new. standing: requests to tell
        of in Progress.standing.
        """
        if not self._running:
            return Progress([], {}, {}, {})
        params, config, settings, usage = self._params, self._config, self._settings(), self.usage
        state = self._prepared(settings)
        admitted, self._new = self._new, {}
        long = {row: run for row, run in admitted.items() if is_long(len(run.prompt), settings)}
        self._filling |= long
        for group in (list(long.items()), [pair for pair in admitted.items() if pair[0] not in long]):
            state = admit(params, config, settings, state, group, usage)
        state = fill(params, config, settings, state, self._filling, usage, self._prefixes)
        passes = 1 if self._filling else passes or self._admit_every
        self._state = decode.advance(params, config, settings, state, np.int32(passes))
        return self._progress(settings, new, standing)

    def _settings(self, joining: GenerateConfig | None = None) -> DecodeSettings:
        """Of those that run, and of one that would. Raises InputError if they cannot share the batch."""
        configs = [run.request.config for run in self._running.values()]
        settings = decode_settings(self._config, configs + [joining] * (joining is not None), *self._how)
        if self._state is None:
            return settings
        if settings.block_length != (block := self._state.masked.shape[2]):
            raise InputError(f"block_length={settings.block_length} beside {block} in one batch, expected one value")
        if (settings.rule == "llada2.2") != (self._state.edits is not None):
            raise InputError(f"rule={settings.rule} beside another in one batch, expected one value")
        return settings

    def _prepared(self, settings: DecodeSettings) -> State:
        """The state, with as many slots as the requests need."""
        if self._state is None:
            config, block, fuse_share = self._config, settings.block_length, self._fuse_share
            if fuse_share is None:
                in_int8 = has_int8_experts(self._params)
                fuse_share = second_block_price(config, self.rows, block, int8_experts=in_int8)
            dtype = settings.execution.dtype or str(self._params["embedding"].dtype)
            shared = dataclasses.replace(settings, sample=False, cut=False)
            canvas = -(-self._max_length // block) * block
            return empty_state(config, shared, self.rows, canvas, dtype, fuse_share)
        if self._state.masked.shape[1] != settings.slots:
            return with_slots(self._state, settings.slots)
        return self._state

    def _progress(self, settings: DecodeSettings, new: bool, standing: Container[int]) -> Progress:
        """What the last step has brought. Frees the rows that have finished."""
        state, usage = self._state, self.usage
        counts = state.iterations, state.busy, state.batch_positions
        finished, start, (iterations, busy, positions) = jax.device_get((state.finished, state.start, counts))
        usage.iterations += int(iterations)
        usage.row_passes += int(iterations) * self.rows
        usage.running_row_passes += int(busy)
        usage.decoding_positions += int(positions)
        going = {row: run for row, run in self._running.items() if not finished[row]}
        done = [row for row in self._running if finished[row] and row not in self._filling]
        asked = {row: run for row, run in going.items() if run.index in standing}
        news, blocks, passes = {}, {}, {}
        # What it costs to look into the rows matters when it is done after each pass.
        if asked or new and any(start[row] > len(run.prompt) + run.told for row, run in going.items()):
            written = state.tokens, state.written_at, state.confidence
            *canvas, denoising, commit = jax.device_get((*written, state.denoising_passes, state.commit_passes))
            canvas = Written(*canvas)
            news = {run.index: run.news(self._known(canvas, row, run, start[row])) for row, run in going.items()}
            blocks = _standing(state, canvas, start, asked)
            passes = {
                run.index: (_prefill_passes(run, settings), int(denoising[row]), int(commit[row]))
                for row, run in going.items()
            }
        runs = [self._running.pop(row) for row in done]
        answers = _answers(self._config, state, done, runs, settings, self._tokenizer) if done else []
        for run, answer in zip(runs, answers, strict=True):
            news[run.index] = run.news(Written(answer.tokens, answer.written_at, answer.confidence))
            passes[run.index] = answer.prefill_passes, answer.forward_passes, answer.commit_passes
        news = {index: found for index, found in news.items() if len(found.tokens)}
        return Progress(answers, news, blocks, {index: passes[index] for index in news})

    def _known(self, canvas: Written, row: int, run: Running, start: int) -> Written:
        """The answer so far: its blocks before `start`, up to an end of sequence."""
        first = len(run.prompt)
        length = len(cut(canvas.tokens[row, first:start], eos_ids_of(self._config, run.request.config)))
        return Written(*(x[row, first : first + length] for x in canvas))


def serve(
    params: Params,
    config: ModelConfig,
    requests: Iterable[Request],
    rows: int,
    max_length: int,
    tokenizer: Tokenizer | None = None,
    admit_every: int = 8,
    execution: Execution = Execution(),
    fuse_share: float | None = None,
    usage: Usage | None = None,
    on_tokens: Callable[[int, np.ndarray], None] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    history: bool | int = False,
) -> Iterator[Answer]:
    """Yields an Answer per request, in the order in which they finish (`in_order` restores that of the requests).

    requests: read only as rows become free; all must share what GenerateConfig says. rows: requests decoded together.
    max_length: most tokens of a prompt and its answer together. tokenizer: decodes Answer.text. admit_every: passes
    between admissions; one, while a prompt is computed in chunks. execution, fuse_share, prefill_chunk, history:
    as in sampling.generate.generate. usage: updated in place. on_tokens(index, tokens): called with the new tokens
    whenever a block of an answer is finished. Raises InputError on a request that is too long or cannot join the batch.

    Example:
        >>> import llada_jax
        >>> model = llada_jax.load_checkpoint("checkpoint")
        >>> settings = llada_jax.GenerateConfig(gen_length=8, block_length=8, steps=2)
        >>> prompts = [model.tokenizer.encode(text) for text in ("def f(", "class", "if")]
        >>> requests = [llada_jax.Request(prompt, settings) for prompt in prompts]
        >>> answers = llada_jax.serve(model.params, model.config, requests, rows=2, max_length=16)
        >>> sorted(answer.index for answer in answers)
        [0, 1, 2]
    """
    batch = Batch(
        params, config, rows, max_length, tokenizer, admit_every, execution, fuse_share, usage, prefill_chunk, history
    )
    queue = enumerate(requests)
    while True:
        for index, request in itertools.islice(queue, batch.free):
            batch.admit(index, request)
        if batch.free == rows:
            return
        progress = batch.step(new=on_tokens is not None)
        if on_tokens is not None:
            ended = {answer.index for answer in progress.answers}
            for index, new in progress.new.items():
                if index not in ended:
                    on_tokens(index, new.tokens)
        for answer in progress.answers:
            if on_tokens is not None and answer.index in progress.new:
                on_tokens(answer.index, progress.new[answer.index].tokens)
            yield answer


def _standing(state: State, canvas: Written, start: np.ndarray, asked: dict[int, Running]) -> dict[int, Written]:
    """The blocks of the requests `asked` [row] as they stand, without what is beyond gen_length."""
    if not asked:
        return {}
    masked, active = jax.device_get((state.masked, state.active))
    found, size = {}, masked.shape[2]
    for row, run in asked.items():
        begin = len(run.prompt)
        first, last = max(start[row], begin), start[row] + active[row] * size
        last = min(last, begin + run.request.config.gen_length)
        left = masked[row].reshape(-1)[first - start[row] : last - start[row]]
        tokens, written_at, confidence = (x[row, first:last] for x in canvas)
        found[run.index] = Written(tokens, np.where(left, -1, written_at), np.where(left, 0, confidence))
    return found


def _prefill_passes(run: Running, settings: DecodeSettings) -> int:
    return num_passes(len(run.prompt), settings) - run.reused // settings.prefill_chunk


def _answers(config, state: State, rows: list[int], runs: list[Running], settings, tokenizer) -> list[Answer]:
    """Of `rows`, which have finished."""
    configs = [run.request.config for run in runs]
    eos_ids = [eos_ids_of(config, g) for g in configs]
    out = collect(state, np.array(rows), [len(run.prompt) for run in runs], configs, eos_ids, settings)
    return [
        Answer(
            index=run.index,
            tokens=out.tokens[i],
            text=None if tokenizer is None else tokenizer.decode_after(run.prompt, out.tokens[i]),
            prefill_passes=_prefill_passes(run, settings),
            forward_passes=int(out.forward_passes[i]),
            commit_passes=int(out.commit_passes[i]),
            positions_evaluated=int(out.positions_evaluated[i]) - run.reused,
            written_at=out.written_at[i],
            confidence=out.confidence[i],
            replay_tokens=out.replay_tokens[i],
            replay_written_at=out.replay_written_at[i],
            replay_confidence=out.replay_confidence[i],
            history=None if out.history is None else out.history[i],
            reused_tokens=run.reused,
        )
        for i, run in enumerate(runs)
    ]


def in_order(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Yields the answers in the order of their requests, each as soon as all before it are there."""
    waiting: dict[int, Answer] = {}
    following = 0
    for answer in answers:
        waiting[answer.index] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1
