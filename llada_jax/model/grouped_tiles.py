"""Tile sizes of the grouped matmul's Pallas kernels: a rule and a checked-in table, never tuned at run time.

A tile is (rows, contracted, columns). By compiler-estimated cycles (tools/bench.py experts):
- All of the contracted side: the accumulator is then written once.
- Few rows: a group's first and last tile are seldom full, and 128 rows already keep 128 x 128 matrix units busy.
- At least two tiles of columns: the only axis that a device of two TensorCores shares out.
"""

import math

from llada_jax.attention.tiles import device_kind
from llada_jax.errors import InputError

ROWS = {"TPU v5 lite": 128, "TPU v5": 128, "TPU v6 lite": 128, "TPU7x": 128}
LARGEST = 2**21  # elements of a weight tile; two of them, of bfloat16, take half of the 16 MiB that a kernel gets


def rows_times_groups(rows: int, contracted: int, columns: int, interpret: bool) -> tuple[int, int, int]:
    """For y [rows, columns] = x [rows, contracted] times its group's matrix. Raises InputError on an unknown device."""
    if interpret:
        return min(16, rows), contracted, _half(columns)
    tile = _half(columns)
    while contracted * tile > LARGEST and tile % 256 == 0:
        tile //= 2
    return _rows(rows), contracted, tile


def group_gradients(rows: int, contracted: int, columns: int, interpret: bool) -> tuple[int, int, int]:
    """For dw [groups, contracted, columns], each the sum over its group's `rows`. Raises InputError likewise."""
    if interpret:
        return min(16, rows), contracted, _half(columns)
    tile, part = _half(columns), contracted
    while part * tile > LARGEST // 2 and part % 256 == 0:
        part //= 2
    return _rows(rows), part, tile


def _rows(rows: int) -> int:
    if (kind := device_kind()) not in ROWS:
        raise InputError(
            f"experts='megablox': no tile sizes for {kind}, only for {', '.join(ROWS)}; elsewhere use experts='xla'"
        )
    return min(ROWS[kind], 16 * math.ceil(rows / 16))


def _half(columns: int) -> int:
    """Half of the columns where that is whole registers of 128, else all."""
    return columns // 2 if columns % 256 == 0 else columns
