"""Tile sizes of the grouped matmul's Pallas kernels: a rule and a checked-in table, never tuned at run time.

A tile is (rows, contracted, columns). By compiler-estimated cycles (tools/bench.py experts):
- The whole contracted side, if it fits: the accumulator is then written once.
- Few rows, since the first and last tile of a group are seldom full, but enough to hide loading the next weights into a
  matrix unit: 128 rows for units of 128 x 128, 256 for units of 256 x 256.
- Two tiles of columns on devices with two TensorCores: they can only share that axis.
"""

import math

from llada_jax.errors import InputError

ROWS = {"TPU v4": 128, "TPU v5 lite": 128, "TPU v5": 128, "TPU v6 lite": 256, "TPU7x": 256}
TWO_CORES = {"TPU v4", "TPU v5"}
LARGEST = 2**21  # elements of a weight tile; two of them, of bfloat16, take half of the 16 MiB that a kernel gets


def rows_times_groups(rows: int, contracted: int, columns: int, kind: str) -> tuple[int, int, int]:
    """For y [rows, columns] = x [rows, contracted] times its group's matrix, on a device of this kind.

    Raises InputError when the table has no such device.
    """
    _check(kind)
    return _rows(kind, rows), contracted, _fewest_parts(columns, 1 + (kind in TWO_CORES), LARGEST // contracted)


def group_gradients(rows: int, contracted: int, columns: int, kind: str) -> tuple[int, int, int]:
    """For dw [groups, contracted, columns], each the sum over its group's rows. Raises InputError likewise."""
    _check(kind)
    part = min(contracted, 2048)  # the accumulator is float32, and the result is held twice
    return _rows(kind, rows), part, _fewest_parts(columns, 1 + (kind in TWO_CORES), LARGEST // 2 // part)


def _check(kind: str) -> None:
    if kind not in ROWS:
        raise InputError(
            f"experts='megablox': no tile sizes for {kind}, only for {', '.join(ROWS)}; elsewhere use experts='xla'"
        )


def _rows(kind: str, rows: int) -> int:
    return min(ROWS[kind], 16 * math.ceil(rows / 16))


def _fewest_parts(columns: int, parts: int, most: int) -> int:
    """The largest tile of whole registers (128 lanes) that cuts the columns into at least `parts`, up to `most`."""
    tile = max(128, columns // parts // 128 * 128)
    while tile > most and tile % 256 == 0:
        tile //= 2
    return min(tile, columns)
