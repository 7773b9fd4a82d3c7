"""The performance that the attention kernel must reach, checked against rows of tools/bench.py attention.

Tiles of different sizes are compared by their cycles per query-key pair.
"""

import dataclasses
from collections.abc import Iterator

from llada_jax.chips import CHIPS

# Chip -> bars for a tile; for packed rows, implementation -> bar.
FULL_OVER_FLOOR = {"v5p": 1.25}
FULL_OVER_SPLASH = {"v6e": 0.7, "tpu7x": 0.7}
MASKED_OVER_SPLASH = {"v5p": 0.5}
PACKED = {"splash_static": 0.45, "splash_tiles": 0.6}  # v5p, both passes, documents of 1024 in rows of 4096
TEMP_GIB = 0.2  # of a row of 2 x 4096 positions


@dataclasses.dataclass(frozen=True)
class Bar:
    name: str
    value: float
    at_most: float

    def __str__(self) -> str:
        verdict = "met" if self.value <= self.at_most else "MISSED"
        return f"{self.name}: {self.value:.3f}, at most {self.at_most}: {verdict}"


def bars(rows: list[dict], head_dim: int) -> Iterator[Bar]:
    """Yields the bars that apply to these rows of the bench's JSON."""
    for row in rows:
        if row["implementation"] != "llada" or row["mean_document"] or row["pass"] not in ("forward", "both"):
            continue
        chip = row["topology"].partition(":")[0]
        splash = next(filter(None, (_same(rows, row, implementation=name) for name in PACKED)), None)
        case = f"{row['topology']}, {row['length']}, {row['pass']}"
        full, masked = (_tile(row, kind) for kind in ("full", "partial"))
        if chip in FULL_OVER_FLOOR:
            floor = 2 * head_dim / CHIPS[chip].macs_per_cycle
            yield Bar(f"{case}: full forward tile / matrix-unit floor", full / floor, FULL_OVER_FLOOR[chip])
        if splash and chip in FULL_OVER_SPLASH:
            ratio = full / _tile(splash, "full")
            yield Bar(f"{case}: full forward tile / splash's", ratio, FULL_OVER_SPLASH[chip])
        if splash and chip in MASKED_OVER_SPLASH:
            ratio = masked / _tile(splash, "partial")
            yield Bar(f"{case}: masked forward tile / splash's", ratio, MASKED_OVER_SPLASH[chip])
        if row["pass"] != "both" or row["length"] != 4096:
            continue
        yield Bar(f"{case}: temporaries of a row, GiB", row["temp_bytes"] / 2**30, TEMP_GIB)
        packed = _same(rows, row, mean_document=1024)
        for name, at_most in PACKED.items() if packed and chip == "v5p" else ():
            if other := _same(rows, packed, implementation=name):
                yield Bar(f"{case}: documents of 1024 / {name}", packed["cycles"] / other["cycles"], at_most)


def _same(rows: list[dict], row: dict, **changed) -> dict | None:
    """The row that equals `row` except for `changed`, or None."""
    names = ("implementation", "length", "mean_document", "pass", "topology")
    values = {name: row[name] for name in names} | changed
    return next((other for other in rows if all(other[name] == values[name] for name in names)), None)


def _tile(row: dict, kind: str) -> float:
    """Cycles per query-key pair."""
    cost = row["classes"][f"forward {kind}" if row["pass"] == "both" else kind]
    return max(cost["bundles"], cost["mxu_cycles"]) / row["tile_pairs"]["forward"]
