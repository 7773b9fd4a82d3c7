"""Retries of writes to a store that fails: a full disk may be emptied, and a network may come back."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable

from llada_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Retry:
    """`retries` more attempts, the first after `seconds`; each pause is twice the one before."""

    retries: int = 0
    seconds: float = 0.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after the n-th failure in a row, n = 1, 2, …"""
        return self.seconds * 2 ** (failures - 1)

    def attempt(self, action: Callable[[], None], what: object) -> None:
        """Calls `action`, and again if it raises OSError. Raises InputError naming `what` after the last attempt."""
        for failures in itertools.count(1):
            try:
                return action()
            except OSError as error:
                text = f"{what}: cannot be written ({error.strerror or error})"
                if failures > self.retries:
                    raise InputError(f"{text}; given up after {failures} attempts") from error
                print(f"{text}; trying again", file=sys.stderr, flush=True)
                time.sleep(self.pause(failures))
