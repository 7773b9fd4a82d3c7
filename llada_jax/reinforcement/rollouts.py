"""Rollouts: groups of answers to questions, decoded by the policy, and all that its learner needs of them.

Answers come from sampling/batching.py: they depend on the weights, the question and their seed alone, not on the batch,
so that any host may decode any of them. A draw's seed is (seed of the run, number of the answer).
"""

from collections.abc import Callable, Sequence

import flax.struct
import numpy as np

from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.sampling.batching import Answer, Request, in_order, serve
from llada_jax.sampling.generate import GenerateConfig


@flax.struct.dataclass
class Rollouts:
    """A row per answer, numpy. tokens int32 [rows, length]: the prompt, the answer, and what was decoded behind it in
    its last block; zero behind that. prompt_length, stop_length, replay_length int32 [rows]: where in the row these
    three end. steps int32, confidence float32 [rows, length]: which step of its block wrote a token, and the
    probability that it then had; -1 and 0 in prompts and where nothing was written. passes int32 [rows]: denoising.
    """

    tokens: np.ndarray
    prompt_length: np.ndarray
    stop_length: np.ndarray
    replay_length: np.ndarray
    steps: np.ndarray
    confidence: np.ndarray
    passes: np.ndarray

    @property
    def in_answer(self) -> np.ndarray:
        """bool [rows, length]: up to and including the end of sequence."""
        return self._between(self.prompt_length, self.stop_length)

    @property
    def in_replay(self) -> np.ndarray:
        """bool [rows, length]: the answer and what follows it in its last block."""
        return self._between(self.prompt_length, self.replay_length)

    @property
    def segment_ids(self) -> np.ndarray:
        """int32 [rows, length]: 1 up to the end of the last block, 0 behind it."""
        return self._between(np.zeros_like(self.replay_length), self.replay_length).astype(np.int32)

    @property
    def answer_tokens(self) -> np.ndarray:
        return self.stop_length - self.prompt_length

    def _between(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        index = np.arange(self.tokens.shape[1])[None]
        return (index >= begin[:, None]) & (index < end[:, None])


def as_rollouts(prompts: list[np.ndarray], answers: list[Answer], length: int) -> Rollouts:
    """The answers to these prompts, in their order. Raises InputError where one does not fit in `length` tokens."""
    rows = len(prompts)
    steps = np.full((rows, length), -1, np.int32)
    tokens, confidence = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    ends = np.zeros((3, rows), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        begin, end = len(prompt), len(prompt) + len(answer.replay_tokens)
        if end > length:
            raise InputError(f"an answer and its prompt have {end} tokens, expected at most data.length={length}")
        tokens[row, :begin], tokens[row, begin:end] = prompt, answer.replay_tokens
        steps[row, begin:end], confidence[row, begin:end] = answer.replay_written_at, answer.replay_confidence
        ends[:, row] = begin, begin + answer.stop_length, end
    return Rollouts(tokens, *ends, steps, confidence, np.array([a.forward_passes for a in answers], np.int32))


def sample(
    params, config: ModelConfig, prompts: Sequence[np.ndarray], settings: GenerateConfig,
    seeds: Sequence[tuple[int, int]], rows: int, length: int, execution: Execution,
    stopped: Callable[[], bool] = lambda: False,
) -> Rollouts | None:  # fmt: skip
    """An answer to each prompt, `rows` decoded together, in rows of `length` tokens. seeds: of each answer.

    None when `stopped` became true on the way: nothing is kept then. Raises InputError where a prompt is too long.
    """
    requests = [Request(prompt, settings, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    answers = []
    served = serve(params, config, requests, min(rows, len(prompts)), length, execution=execution)
    for answer in in_order(served):
        answers.append(answer)
        if stopped():
            return None
    return as_rollouts(prompts, answers, length)
