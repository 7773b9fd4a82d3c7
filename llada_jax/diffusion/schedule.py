"""Warmup-Stable-Decay: the block size of every training step (Section 4.1).

Warm-up grows the blocks 1 -> 4 -> 32 -> 64 -> L, the stable phase trains full-sequence MDLM without the clean half, and
decay shrinks the blocks L -> ... -> 32. Block size is a run-time value: the curriculum compiles to two programs, with
and without the clean half.
"""

import dataclasses
from collections.abc import Sequence

from llada_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Phase:
    """A number of steps at one block size. halves: what a pass computes, "both" [x_t | x_0], "noisy" x_t alone (MDLM)
    or "clean" x_0 alone (AR).
    """

    name: str
    block_size: int
    steps: int
    halves: str


def wsd(
    length: int,
    warmup: Sequence[tuple[int, int]],
    stable_steps: int,
    decay: Sequence[tuple[int, int]],
) -> tuple[Phase, ...]:
    """Returns the phases of Warmup-Stable-Decay over rows of `length` tokens, without those of no steps.

    warmup, decay: (block size, steps) pairs, in order. stable_steps: steps of full-sequence MDLM between them. Raises
    InputError if a block size does not divide the length or a number of steps is negative.

    Example:
        >>> import llada_jax
        >>> phases = llada_jax.wsd_schedule(64, warmup=[(1, 10), (8, 10)], stable_steps=50, decay=[(32, 10)])
        >>> [(phase.name, phase.block_size, phase.steps) for phase in phases]
        [('warmup', 1, 10), ('warmup', 8, 10), ('stable', 64, 50), ('decay', 32, 10)]
    """
    phases = [_both("warmup", length, *pair) for pair in warmup]
    phases.append(Phase("stable", length, stable_steps, "noisy"))
    phases += [_both("decay", length, *pair) for pair in decay]
    return _checked(phases, length)


def constant(length: int, block_size: int, steps: int) -> tuple[Phase, ...]:
    """Returns one phase at one block size; block_size == length is MDLM. Raises InputError as `wsd` does."""
    return _checked([_both("train", length, block_size, steps)], length)


def autoregressive(length: int, steps: int) -> tuple[Phase, ...]:
    """Returns one phase of next-token prediction: block size 1, clean half only. Raises InputError as `wsd` does."""
    return _checked([Phase("ar", 1, steps, "clean")], length)


def _both(name: str, length: int, block_size: int, steps: int) -> Phase:
    # With one block the noisy half never sees the clean one, which need not be computed.
    return Phase(name, block_size, steps, "noisy" if block_size == length else "both")


def _checked(phases: list[Phase], length: int) -> tuple[Phase, ...]:
    for phase in phases:
        if not phase.steps >= 0:
            raise InputError(f"schedule: {phase.name} at block size {phase.block_size} has {phase.steps} steps")
        if not phase.block_size >= 1 or length % phase.block_size:
            raise InputError(f"schedule: {phase.name} block size {phase.block_size} does not divide length {length}")
    return tuple(phase for phase in phases if phase.steps)


def total_steps(phases: Sequence[Phase]) -> int:
    """Steps of all phases together."""
    return sum(phase.steps for phase in phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Returns the phase of a step; steps count from 0. Raises IndexError past the end."""
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    raise IndexError(f"the schedule has {total_steps(phases)} steps")
