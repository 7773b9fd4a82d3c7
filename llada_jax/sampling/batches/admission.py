"""How requests come into a batch: their rows are set up, and their prompts computed or taken from what is known."""

import dataclasses

import jax
import numpy as np

from llada_jax import sharding
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import Params
from llada_jax.sampling import decode
from llada_jax.sampling.batches.prefixes import Prefixes, chain
from llada_jax.sampling.batches.requests import Request, Usage
from llada_jax.sampling.generate import pad, requests_of
from llada_jax.sampling.prefill import is_long, num_passes
from llada_jax.sampling.state import KEYS, DecodeSettings, State, Written


@dataclasses.dataclass
class Running:
    """A request that has a row. index: its number; prompt int32."""

    index: int
    request: Request
    prompt: np.ndarray
    told: int = 0  # answer tokens that have been told of
    filled: int = 0  # prompt tokens that are computed, of a prompt that is computed in chunks
    reused: int = 0  # of those, how many were taken from Prefixes
    keys: list[bytes] = dataclasses.field(default_factory=list)  # there, of its chunks

    def news(self, known: Written) -> Written:
        """Of all that is known of the answer, what is new since the last call."""
        first, self.told = self.told, max(self.told, len(known.tokens))
        return Written(*(x[first:] for x in known))


def admit(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, new: list[tuple[int, Running]],
    usage: Usage,
) -> State:  # fmt: skip
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
    keys = jax.random.wrap_key_data(np.array([_key_of(seed) for seed in seeds], np.uint32), impl=KEYS)
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


def fill(
    params: Params, config: ModelConfig, settings: DecodeSettings, state: State, filling: dict[int, Running],
    usage: Usage, prefixes: Prefixes | None,
) -> State:  # fmt: skip
    """Computes the next chunk of a prompt in each part of the batch: of the row that waits longest. What is known of
    the prompt is taken.
    """
    if not filling:
        return state
    rows, size = len(state.finished), min(settings.prefill_chunk, state.tokens.shape[1])
    parts = sharding.num_parts("batch", rows)
    chosen, first = np.full(parts, rows, np.int32), np.zeros(parts, np.int32)  # out of bounds: none
    keep = []
    for row, run in list(filling.items()):
        part = row // (rows // parts)
        if chosen[part] < rows:
            continue
        if prefixes is not None:
            run.keys = run.keys or chain(settings, state.tokens.shape[1], run.prompt)
            but_last = run.keys[: num_passes(len(run.prompt), settings) - 1]
            state, filled = prefixes.take(state, row, but_last, run.filled, size)
            run.reused, run.filled = run.reused + filled - run.filled, filled
            if len(run.keys) > filled // size:  # the next chunk is whole
                keep.append((row, run.keys[: filled // size + 1]))
        chosen[part], first[part] = row, run.filled
        run.filled += size
        if run.filled + settings.block_length > len(run.prompt):
            del filling[row]
    usage.prefill_passes += 1
    usage.prefill_positions += parts * size
    settings = dataclasses.replace(settings, sample=False, cut=False)  # a chunk draws nothing: one program for all
    state = decode.fill(params, config, settings, state, chosen, first)
    for row, keys in keep:
        prefixes.keep(state, row, keys, size)
    return state


def _key_of(seed: int | tuple[int, int]) -> tuple[int, int]:
    """The two words of a key: those of jax.random.key for an int, a hash for a pair."""
    if not isinstance(seed, tuple):
        return 0, seed
    first, second = np.random.SeedSequence(seed).generate_state(2)
    return int(first), int(second)
