"""Wall-clock times on a machine that other work shares: the least of several."""

import time
from collections.abc import Callable, Mapping

import jax


def least_seconds(run: Callable[[], object], repeats: int = 3, warm_up: bool = False) -> float:
    """As least_in_turn, of one."""
    return least_in_turn({"": run}, repeats, warm_up)[""]


def least_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """Of `repeats` runs of each, in turn: all see the same machine. What a run returns is waited for; warm_up: one run
    more, which may compile, is not counted.
    """
    seconds = {name: [] for name in runs}
    for number in range(-warm_up, repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: min(times) for name, times in seconds.items()}
