"""Continuous batching: takes requests from an iterator and yields answers as they finish. A finished row takes the next
request.

The device runs `admit_every` passes over the batch, then the host collects and admits. A long prompt is computed in
chunks, one between two passes, so that the rows that decode go on meanwhile. An answer depends on its request alone:
not on the rest of the batch, nor on when it was admitted.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import sharding
from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.parameters import Params
from llada_jax.sampling import decode
from llada_jax.sampling.cost import second_block_price
from llada_jax.sampling.generate import (
    GenerateConfig,
    check_prompts,
    collect,
    cut,
    decode_settings,
    eos_ids_of,
    pad,
    requests_of,
)
from llada_jax.sampling.history import History
from llada_jax.sampling.prefill import is_long
from llada_jax.sampling.quantize import has_int8_experts
from llada_jax.sampling.state import KEYS, PREFILL_CHUNK, State, empty_state, with_slots
from llada_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to decode it.

    prompt: 1-D int array of token ids. seed: of its draws, an int in [0, 2^32), or a pair of them (seed of a run,
    number of the request): different pairs share no draws. None is the request's number in the stream.

    Example:
        >>> import llada_jax, numpy as np
        >>> request = llada_jax.Request(np.array([5, 6, 7]), llada_jax.GenerateConfig(gen_length=8), seed=1)
        >>> request.config.block_length
        32
    """

    prompt: np.ndarray
    config: GenerateConfig
    seed: int | tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one request. index: its number in the stream, from 0. text: the text that the tokens add to the
    prompt, without special tokens; None without a tokenizer. The rest is as in sampling.generate.Generation.
    """

    index: int
    tokens: np.ndarray
    text: str | None
    prefill_passes: int
    forward_passes: int
    commit_passes: int
    positions_evaluated: int
    written_at: np.ndarray
    confidence: np.ndarray
    replay_tokens: np.ndarray
    replay_written_at: np.ndarray
    replay_confidence: np.ndarray
    history: History | None = None

    @property
    def stop_length(self) -> int:
        """Of the answer, where the replay goes on."""
        return len(self.tokens)

    @property
    def steps(self) -> np.ndarray:
        """Former name of written_at."""
        return self.written_at

    @property
    def tokens_per_forward(self) -> float:
        """Answer tokens over all passes."""
        return len(self.tokens) / max(self.prefill_passes + self.forward_passes + self.commit_passes, 1)


@dataclasses.dataclass
class Usage:
    """Work of the device so far. Positions are those of all rows, idle rows and the padding of prefills included.

    iterations: decoding passes. row_passes: rows summed over them; running_row_passes: rows that decode, which those
    whose prompts are being computed in chunks do not.
    """

    iterations: int = 0
    row_passes: int = 0
    running_row_passes: int = 0
    decoding_positions: int = 0
    prefill_passes: int = 0
    prefill_positions: int = 0

    @property
    def busy(self) -> float:
        """Share of rows that decode, over all decoding passes."""
        return self.running_row_passes / max(self.row_passes, 1)


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
    if rows < 1 or admit_every < 1:
        raise InputError(f"rows={rows}, admit_every={admit_every}, expected at least 1")
    usage = Usage() if usage is None else usage
    params = decode.loop_weights(params, config, execution)
    queue = enumerate(requests)
    running: dict[int, _Running] = {}  # by row
    state = block = None
    filling: dict[int, _Running] = {}  # those of `running` whose prompts are being computed in chunks
    while True:
        free = [row for row in range(rows) if row not in running]
        new = list(zip(free, queue, strict=False)) if free else []
        new = [(row, _check(config, index, request, max_length)) for row, (index, request) in new]
        running |= dict(new)
        if not running:
            return
        configs = [run.request.config for run in running.values()]
        settings = decode_settings(config, configs, execution, prefill_chunk, history)
        if state is None:
            block = settings.block_length
            dtype = execution.dtype or str(params["embedding"].dtype)
            if fuse_share is None:
                fuse_share = second_block_price(config, rows, block, int8_experts=has_int8_experts(params))
            shared = dataclasses.replace(settings, sample=False, cut=False)
            state = empty_state(config, shared, rows, -(-max_length // block) * block, dtype, fuse_share)
        elif settings.block_length != block:
            raise InputError(f"block_length={settings.block_length} beside {block} in one batch, expected one value")
        elif (settings.rule == "llada2.2") != (state.edits is not None):
            raise InputError(f"rule={settings.rule} beside another in one batch, expected one value")
        if state.masked.shape[1] != settings.slots:
            state = with_slots(state, settings.slots)
        long = {row: run for row, run in new if is_long(len(run.prompt), settings)}
        filling |= long
        for group in (list(long.items()), [pair for pair in new if pair[0] not in long]):
            state = _admit(params, config, settings, state, group, usage)
        state = _fill(params, config, settings, state, filling, usage)
        state = decode.advance(params, config, settings, state, jnp.int32(1 if filling else admit_every))
        yield from _finished(config, state, running, filling, settings, tokenizer, on_tokens, usage)


@dataclasses.dataclass
class _Running:
    index: int
    request: Request
    prompt: np.ndarray
    told: int = 0  # answer tokens that on_tokens has been given
    filled: int = 0  # prompt tokens that are computed, of a prompt that is computed in chunks

    def tell(self, known: np.ndarray, on_tokens) -> None:
        if len(known) > self.told:
            on_tokens(self.index, known[self.told :])
            self.told = len(known)


def _check(config: ModelConfig, index: int, request: Request, max_length: int) -> _Running:
    (prompt,) = check_prompts(config, [request.prompt])
    block = request.config.block_length
    longest = -(-max_length // block) * block
    if len(prompt) + request.config.gen_length > longest:
        raise InputError(
            f"request {index}: {len(prompt)} prompt tokens and gen_length={request.config.gen_length}, "
            f"expected at most {longest} together (max_length)"
        )
    seeds = request.seed if isinstance(request.seed, tuple) else (request.seed or 0,)
    if not all(isinstance(seed, int | np.integer) and 0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"request {index}: seed={request.seed!r}, expected an integer in [0, 2^32)")
    return _Running(index, request, prompt)


def _admit(params, config, settings, state: State, new, usage: Usage) -> State:
    """Admits new requests, and prefills them together unless they are long. Rounds their number and length up to powers
    of two, to compile few programs.
    """
    if not new:
        return state
    count = 1 << (len(new) - 1).bit_length()
    padded = new + [(len(state.finished), new[0][1])] * (count - len(new))  # out of bounds: dropped
    runs = [run for _, run in padded]
    lengths = np.array([len(run.prompt) for run in runs])
    seeds = [run.index if run.request.seed is None else run.request.seed for run in runs]
    keys = jax.random.wrap_key_data(np.array([_key_data(seed) for seed in seeds], np.uint32), impl=KEYS)
    requests = requests_of(config, lengths, [run.request.config for run in runs], keys)
    canvas, blocks = state.tokens.shape[1], int(lengths.max()) // settings.block_length
    at_once = blocks and not is_long(lengths.max(), settings)
    prefill = min((1 << (blocks - 1).bit_length()) * settings.block_length, canvas) if at_once else 0
    usage.prefill_passes += prefill > 0
    usage.prefill_positions += prefill * count
    rows = np.array([row for row, _ in padded], np.int32)
    return decode.admit(
        params, config, settings, state, rows, requests, pad([run.prompt for run in runs], canvas), prefill
    )


def _fill(params, config, settings, state: State, filling: dict[int, _Running], usage: Usage) -> State:
    """Computes the next chunk of a prompt in each part of the batch: of the row that waits longest."""
    if not filling:
        return state
    rows, size = len(state.finished), min(settings.prefill_chunk, state.tokens.shape[1])
    parts = sharding.num_parts("batch", rows)
    chosen, first = np.full(parts, rows, np.int32), np.zeros(parts, np.int32)  # out of bounds: none
    for row, run in list(filling.items()):
        part = row // (rows // parts)
        if chosen[part] == rows:
            chosen[part], first[part] = row, run.filled
            run.filled += size
            if run.filled + settings.block_length > len(run.prompt):
                del filling[row]
    usage.prefill_passes += 1
    usage.prefill_positions += parts * size
    settings = dataclasses.replace(settings, sample=False, cut=False)  # a chunk draws nothing: one program for all
    return decode.fill(params, config, settings, state, chosen, first)


def _key_data(seed: int | tuple[int, int]) -> tuple[int, int]:
    """The two words of a key: those of jax.random.key for an int, a hash for a pair."""
    if not isinstance(seed, tuple):
        return 0, seed
    first, second = np.random.SeedSequence(seed).generate_state(2)
    return int(first), int(second)


def _finished(config, state: State, running: dict, filling: dict, settings, tokenizer, on_tokens, usage: Usage):
    """Yields answers of finished rows and frees the rows; reports finished blocks to on_tokens."""
    rows = len(state.finished)
    finished, start = np.asarray(state.finished), np.asarray(state.start)
    usage.iterations += int(state.iterations)
    usage.row_passes += int(state.iterations) * rows
    usage.running_row_passes += int(state.busy)
    usage.decoding_positions += int(state.batch_positions)
    done = [row for row in running if finished[row] and row not in filling]
    if on_tokens is not None:
        tokens = np.asarray(state.tokens)
        for row, run in running.items():
            if not finished[row]:
                known = cut(tokens[row, len(run.prompt) : start[row]], eos_ids_of(config, run.request.config))
                run.tell(known, on_tokens)
    if not done:
        return
    runs = [running.pop(row) for row in done]
    configs = [run.request.config for run in runs]
    eos_ids = [eos_ids_of(config, g) for g in configs]
    out = collect(state, np.array(done), [len(run.prompt) for run in runs], configs, eos_ids, settings)
    for i, run in enumerate(runs):
        if on_tokens is not None:
            run.tell(out.tokens[i], on_tokens)
        yield Answer(
            index=run.index,
            tokens=out.tokens[i],
            text=None if tokenizer is None else tokenizer.decode_after(run.prompt, out.tokens[i]),
            prefill_passes=int(out.prefill_passes[i]),
            forward_passes=int(out.forward_passes[i]),
            commit_passes=int(out.commit_passes[i]),
            positions_evaluated=int(out.positions_evaluated[i]),
            written_at=out.written_at[i],
            confidence=out.confidence[i],
            replay_tokens=out.replay_tokens[i],
            replay_written_at=out.replay_written_at[i],
            replay_confidence=out.replay_confidence[i],
            history=None if out.history is None else out.history[i],
        )


def in_order(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Yields the answers in the order of their requests, each as soon as all before it are there."""
    waiting: dict[int, Answer] = {}
    following = 0
    for answer in answers:
        waiting[answer.index] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1
