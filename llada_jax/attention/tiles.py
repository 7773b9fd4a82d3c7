"""Tile sizes of the attention kernel: a checked-in table, never a flag and never tuned at run time."""

import dataclasses

import jax

from llada_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernel cuts its work.

    queries: positions of a query tile; the tile holds every query head of one key/value head at these positions.
    forward, backward: chunks of keys in one step. chunk: keys that are skipped or fetched as a whole.
    """

    queries: int
    forward: int
    backward: int
    chunk: int = 128


# Rows of a query tile (heads of the group x positions) that fill the matrix units.
ROWS = 512

# (device kind, head_dim) -> chunks of a (forward, backward) step, by compiler-estimated cycles at 512 rows.
STEPS = {
    ("TPU v5 lite", 64): (4, 4),
    ("TPU v5 lite", 128): (4, 2),
    ("TPU v5", 64): (4, 4),
    ("TPU v5", 128): (4, 2),
    ("TPU v6 lite", 64): (4, 4),
    ("TPU v6 lite", 128): (8, 4),
    ("TPU7x", 64): (4, 4),
    ("TPU7x", 128): (4, 4),
}


def device_kind() -> str:
    """The kind of device that a program traced now is for: that of the mesh in force, else the default device's."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def tiles_for(kind: str, head_dim: int, group: int, queries: int) -> Tiles:
    """Tile sizes for a device kind, head_dim, group (query heads of a key/value head) and number of query positions.

    Raises InputError when the table has no such device or head_dim.
    """
    if (kind, head_dim) not in STEPS:
        known = ", ".join(sorted({f"{kind} (head_dim {dim})" for kind, dim in STEPS}))
        raise InputError(
            f"attention='kernel': no tile sizes for {kind} with head_dim {head_dim}, only for {known}; "
            "elsewhere use attention='blockwise'"
        )
    forward, backward = STEPS[kind, head_dim]
    # Whole registers of positions where possible: the mask of a tile is then made once for all heads of the group.
    unit = 128 if ROWS // group >= 128 else 32
    fitting = max(unit, ROWS // group // unit * unit)
    return Tiles(queries=min(fitting, -(-queries // 32) * 32), forward=forward, backward=backward)
