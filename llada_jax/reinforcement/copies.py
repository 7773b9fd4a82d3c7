"""The noisy copies of answers on which a policy is scored: two generators of masks over one loss.

    elbo         N copies; in each, every block of an answer is masked at a level of its own. E = sum of the masked
                 tokens' log p / (N p) over the copies is an estimate of the answer's ELBO (EBPO, LLaDA2.1 report)
    trajectory   as many copies as the longest block has steps; copy r hides what the sampler had not yet written before
                 its r-th step in each block, and scores what that step wrote (TraceRL, arXiv 2509.06949)

Masks are drawn once, in numpy, as functions of a seed, and kept with the answers: policy, old policy and reference are
scored on the same copies. The sampler's blocks count from the start of the row, as do these ("global" origin).
"""

import flax.struct
import numpy as np

from llada_jax.errors import InputError
from llada_jax.reinforcement.rollouts import Rollouts

TOKEN_WEIGHTS = ("answer", "step")


@flax.struct.dataclass
class Copies:
    """[copies, rows, length]. hidden bool: tokens that are masks in x_t. weights float32: of the scored tokens, zero
    elsewhere: their share of E in "elbo", of the loss in "trajectory".
    """

    hidden: np.ndarray
    weights: np.ndarray

    @property
    def scored(self):
        return self.weights > 0


def elbo_copies(rollouts: Rollouts, block_size: int, copies: int, seed) -> Copies:
    """EBPO's masks. Of the J blocks that hold answer tokens, in all rows, the j-th has level u_j = (offset + j / J) mod
    1 in a copy with one random offset: stratified, and uniform for each block. m = min(floor(u len) + 1, len) of its
    len answer tokens are masked, each m equally likely sets, p = m / len. j counts blocks before rows, so that the
    levels of one answer are spread. That order is ours; EBPO's public code has the same levels.

    What follows an answer in its last block is hidden too and not scored, as in SFT (objectives.tails): the decoder
    sees masks there. seed: an int, or a sequence of ints.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    answer = _in_blocks(rollouts.in_answer, block_size)
    sizes = answer.sum(axis=2)  # [rows, blocks]
    row, block = np.nonzero(sizes)
    order = np.lexsort((row, block - rollouts.prompt_length[row] // block_size))
    cells, count = (row[order], block[order]), max(len(order), 1)
    shape = (copies, *rollouts.tokens.shape)
    hidden, weights = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for n in range(copies):
        level = (random.random() + np.arange(len(order)) / count) % 1.0
        chosen = np.zeros_like(sizes)
        chosen[cells] = np.minimum(np.floor(level * sizes[cells]).astype(np.int64) + 1, sizes[cells])
        draws = np.where(answer, random.random(answer.shape), 2.0)
        masked = np.argsort(np.argsort(draws, axis=2), axis=2) < chosen[:, :, None]
        share = np.where(masked, sizes[:, :, None] / (copies * np.maximum(chosen, 1))[:, :, None], 0)
        hidden[n], weights[n] = masked.reshape(shape[1:]), share.reshape(shape[1:])
    return Copies(hidden | (rollouts.in_replay & ~rollouts.in_answer), weights)


def trajectory_copies(
    rollouts: Rollouts, block_size: int, shrink: int = 1, weighting: str = "answer", copies: int | None = None
) -> Copies:
    """TraceRL's masks: one copy for each `shrink` neighbouring steps of a block, in all blocks at once.

    Every token that the sampler wrote is scored in exactly one copy, those behind the end of sequence in the last block
    too (CJ-GRPO, arXiv 2509.23924); what it never wrote is hidden in all. weighting: "answer" weights the tokens of a
    row equally, 1 / its number (TraceRL); "step" takes the mean over the tokens of each step, then over the row's steps
    (CJ-GRPO). copies: at least so many, empty ones behind, so that few programs are compiled. Raises InputError on an
    unknown weighting.
    """
    if weighting not in TOKEN_WEIGHTS:
        raise InputError(f"rl.token_weights={weighting!r}, expected one of {', '.join(TOKEN_WEIGHTS)}")
    steps = _in_blocks(rollouts.steps, block_size)
    written = steps >= 0
    rounds = _earlier_steps(steps) // shrink
    number = max(int(rounds.max(initial=-1, where=written)) + 1, copies or 0)
    shape = (number, *rollouts.tokens.shape)
    index = np.arange(number)[:, None, None, None]
    hidden = (written & (rounds >= index)).reshape(shape) | (rollouts.in_replay & (rollouts.steps < 0))
    scored = written & (rounds == index)
    share = 1 / np.maximum(written.sum(axis=(1, 2)), 1)[:, None, None]  # of a row's tokens
    if weighting == "step":
        per_step = scored.sum(axis=3, keepdims=True)  # [copies, rows, blocks, 1]
        share = 1 / (np.maximum(per_step, 1) * np.maximum((per_step > 0).sum(axis=(0, 2), keepdims=True), 1))
    return Copies(hidden, np.where(scored, share, 0).astype(np.float32).reshape(shape))


def _in_blocks(values: np.ndarray, block_size: int) -> np.ndarray:
    """[rows, length] -> [rows, blocks, block_size]."""
    return values.reshape(len(values), -1, block_size)


def _earlier_steps(steps: np.ndarray) -> np.ndarray:
    """Of each token [rows, blocks, block_size], the number of earlier steps in its block that wrote something."""
    ordered = np.sort(steps, axis=2)
    begins = np.diff(ordered, axis=2, prepend=-1) > 0  # the first token of each step; unwritten ones are -1
    before = np.cumsum(begins, axis=2) - 1
    place = np.argsort(np.argsort(steps, axis=2, kind="stable"), axis=2)
    return np.take_along_axis(before, place, axis=2)
