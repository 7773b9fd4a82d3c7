"""Weighted mixtures of packed datasets, as reproducible as one dataset.

The component of the n-th row, and how many rows of that component came before, are functions of n alone. Each component
goes through its own rows, permuted again in each of its epochs. So the rows of a step depend on (seed, step,
data_offset) only, not on what was read before.
"""

import bisect
import hashlib
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from llada_jax.data.order import MAX_ROWS, Order, Rows
from llada_jax.data.rows import Row
from llada_jax.errors import InputError

_MAX_PERIOD = 10_000


def parse_mixture(text: str) -> list[tuple[str, Fraction]]:
    """Returns [(folder, share)] of the components of "A:0.7,B:0.3"; the shares add up to exactly 1.

    Weights are positive decimals or fractions, divided by their sum. Raises InputError naming the entry.
    """
    components = []
    for entry in text.split(","):
        path, colon, weight = entry.strip().rpartition(":")
        try:
            weight = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            colon = ""
        if not colon or not path or weight <= 0:
            raise InputError(f"mixture: {entry!r}, expected FOLDER:WEIGHT with a weight above 0")
        if path in (known for known, _ in components):
            raise InputError(f"mixture: {path} is named twice")
        components.append((path, weight))
    total = sum(weight for _, weight in components)
    return [(path, weight / total) for path, weight in components]


def interleave(shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Spreads components evenly: after any n rows, component c has contributed share_c * n rows, to within one row.

    shares: positive, with sum 1. Returns (component, earlier), int64 [period] each: the component of a row, and how
    many rows of that component came before in the period. The period is the common denominator of the shares and has
    exactly share_c * period rows of component c. Raises InputError if it exceeds 10,000.

    Row m of component c (from 0) is due between m / share_c and (m + 1) / share_c. At every n, the released row with
    the earliest deadline is chosen. With shares that sum to 1 no row is late (Pfair scheduling, Baruah et al. 1996, on
    one processor).
    """
    period = math.lcm(*(share.denominator for share in shares))
    if period > _MAX_PERIOD:
        raise InputError(
            f"mixture: the weights, divided by their sum, have the common denominator {period}; round them so that it "
            f"is at most {_MAX_PERIOD}"
        )
    rows = [int(share * period) for share in shares]
    done = [0] * len(shares)
    component, earlier = np.zeros((2, period), np.int64)
    for n in range(period):
        may_come = [c for c, count in enumerate(rows) if done[c] * period < count * (n + 1)]
        chosen = min(may_come, key=lambda c: -(-(done[c] + 1) * period // rows[c]))  # the first of equals
        component[n], earlier[n] = chosen, done[chosen]
        done[chosen] += 1
    return component, earlier


class Mixture(Order):
    """Rows of several datasets in the proportions of their shares (parse_mixture), to within one row at any point.

    The id of a row is its id in its component plus the number of rows stored in earlier components, so that no two rows
    share an id or its noise. The epoch is that of the component. Raises InputError if the components differ in length,
    if together they have more rows than ids, or as `interleave`.

    Attributes: `length`, `digest`.
    """

    def __init__(self, components: Sequence[Rows], shares: Sequence[Fraction]):
        lengths = {rows.length for rows in components}
        if len(lengths) != 1:
            raise InputError(f"mixture: rows of {', '.join(map(str, sorted(lengths)))} tokens, expected one length")
        self.length = lengths.pop()
        self.digest = hashlib.sha256(
            repr([(rows.digest, str(share)) for rows, share in zip(components, shares, strict=True)]).encode()
        ).hexdigest()
        self._components = components
        self._component, self._earlier = interleave(shares)
        self._in_period = np.bincount(self._component, minlength=len(components))
        *self._first_ids, stored = itertools.accumulate((rows.stored for rows in components), initial=0)
        if stored > MAX_ROWS:
            raise InputError(f"mixture: {stored} rows, more than {MAX_ROWS}")

    def __len__(self) -> int:
        return sum(map(len, self._components))

    def index(self, n: int) -> tuple[int, int]:
        period, place = divmod(n, len(self._component))
        component = int(self._component[place])
        row_id, epoch = self._components[component].index(
            period * int(self._in_period[component]) + int(self._earlier[place])
        )
        return self._first_ids[component] + row_id, epoch

    def read(self, row_id: int) -> Row:
        component = bisect.bisect_right(self._first_ids, row_id) - 1
        return self._components[component].read(row_id - self._first_ids[component])


def component_seed(seed: int, component: int) -> int:
    """The seed of a component's permutations; components of the same size get different ones."""
    return int(np.random.SeedSequence((seed, component)).generate_state(1)[0])
