"""Wall-clock times on a shared machine: the minimum of several runs."""

import time
from collections.abc import Callable, Mapping

import jax


def least_seconds(run: Callable[[], object], repeats: int = 3, warm_up: bool = False) -> float:
    """least_in_turn for a single function."""
    return least_in_turn({"": run}, repeats, warm_up)[""]


def least_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """{name: minimum seconds} of `repeats` runs, in turn, so that all see the same machine load.

    Waits for the arrays that a run returns. warm_up: one more run first, which may compile and is not counted.
    """
    seconds = {name: [] for name in runs}
    for number in range(-warm_up, repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: min(times) for name, times in seconds.items()}
