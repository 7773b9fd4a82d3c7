"""What continuous batching takes and gives: requests, answers, and what the device did for them."""

import dataclasses

import numpy as np

from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.sampling.generate import GenerateConfig, check_prompts
from llada_jax.sampling.history import History


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
    prompt, without special tokens; None without a tokenizer. reused_tokens: of the prompt, whose keys and values were
    known (batches/prefixes.py); passes and positions do not count them. The rest is as in sampling.generate.Generation.
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
    reused_tokens: int = 0

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


def check(config: ModelConfig, index: int | None, request: Request, max_length: int) -> np.ndarray:
    """Returns its prompt, int32. Raises InputError on a request that is too long, or a bad seed; ValueError on a bad
    prompt. index: for the message, its number.
    """
    name = "" if index is None else f"request {index}: "
    (prompt,) = check_prompts(config, [request.prompt])
    block = request.config.block_length
    longest = -(-max_length // block) * block
    if len(prompt) + request.config.gen_length > longest:
        raise InputError(
            f"{name}{len(prompt)} prompt tokens and gen_length={request.config.gen_length}, "
            f"expected at most {longest} together (max_length)"
        )
    seeds = request.seed if isinstance(request.seed, tuple) else (request.seed or 0,)
    if not all(isinstance(seed, int | np.integer) and 0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"{name}seed={request.seed!r}, expected an integer in [0, 2^32)")
    return prompt
