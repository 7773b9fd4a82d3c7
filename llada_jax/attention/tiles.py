"""Tile sizes of the attention kernel: a checked-in table, never a flag and never tuned at run time.

The table is tiles.json beside this file, with one entry per chip, head size and kind of row. tools/tune_tiles.py fills
it and records the cost of each choice.
"""

import dataclasses
import json
from pathlib import Path

import jax

from llada_jax.errors import InputError

TABLE = Path(__file__).with_name("tiles.json")
# Kinds of rows and their most query positions: a block or two against a cache, or a whole row.
SHAPES = {"decode": 64, "row": None}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernel cuts its work.

    queries: positions per query tile; the tile holds all query heads of one key/value head at these positions. forward,
    backward: chunks of keys per step of that pass. chunk: keys that are fetched or skipped together.
    """

    queries: int
    forward: int
    backward: int
    chunk: int = 128


@dataclasses.dataclass(frozen=True)
class TileEntry:
    """One entry of the table. rows: rows of a query tile, heads of the group x positions; the rest is as in Tiles.

    cost: measured by the tool, {"unit": "cycles" (compiler's estimate) or "seconds" (on a device), and one number per
    pass}; None if the choice was made by hand.
    """

    device_kind: str
    head_dim: int
    shape: str
    rows: int
    forward: int
    backward: int
    chunk: int
    cost: dict | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        return self.device_kind, self.head_dim, self.shape


def read_table(path: Path = TABLE) -> dict[tuple[str, int, str], TileEntry]:
    """{(device kind, head_dim, shape): TileEntry}."""
    entries = [TileEntry(**entry) for entry in json.loads(path.read_text())]
    return {entry.key: entry for entry in entries}


def write_table(entries: dict[tuple[str, int, str], TileEntry], path: Path = TABLE) -> None:
    """Writes one entry per line, sorted, so that a change is one line of a diff."""
    lines = [json.dumps(dataclasses.asdict(entries[key])) for key in sorted(entries)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


ENTRIES = read_table()


def device_kind() -> str:
    """Returns the device kind that the current trace is for: that of the mesh in force, else of the default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def tiles_for(kind: str, head_dim: int, group: int, queries: int) -> Tiles:
    """Returns tile sizes for a device kind, head_dim, group (query heads per key/value head) and query positions.

    Raises InputError if the table has no such device or head_dim.
    """
    shape = next(name for name, most in SHAPES.items() if most is None or queries <= most)
    if (kind, head_dim, shape) not in ENTRIES:
        known = ", ".join(sorted({f"{kind} (head_dim {dim})" for kind, dim, _ in ENTRIES}))
        raise InputError(
            f"attention='kernel': no tile sizes for {kind} with head_dim {head_dim}, only for {known}; "
            "elsewhere use attention='blockwise'"
        )
    return cut(ENTRIES[kind, head_dim, shape], group, queries)


def cut(entry: TileEntry, group: int, queries: int) -> Tiles:
    """Returns the tiles of an entry for a group (query heads per key/value head) and a number of query positions."""
    # Whole registers of positions where possible: the mask of a tile is then made once for all heads of the group.
    unit = 128 if entry.rows // group >= 128 else 32
    fitting = max(unit, entry.rows // group // unit * unit)
    return Tiles(min(fitting, -(-queries // 32) * 32), entry.forward, entry.backward, entry.chunk)
