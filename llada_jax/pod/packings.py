"""The fixed rows that attention is costed on: document lengths, checked in beside this file.

They were drawn once from a lognormal distribution with sigma 1, as documents are packed: one after the other, the last
cut where the row ends, none aligned to blocks.

    lengths = numpy.random.default_rng([length, mean]).lognormal(numpy.log(mean) - 0.5, 1, ...)   # rounded, at least 1
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

LENGTHS = (2048, 4096, 8192)
LONG_LENGTHS = (32_768, 65_536)  # of rehearsals alone: the bench takes the keys of a row at once
MEANS = (0, 512, 1024)  # tokens; 0 is one document a row
ROWS = 16
# Decoding: the shares of the cache that the rows of a batch have filled.
FILLED = tuple((2 * row + 1) / (2 * ROWS) for row in range(ROWS))


@dataclasses.dataclass(frozen=True)
class KernelCounts:
    """What a kernel executes for one row, all heads: times per region ("step" among them), entries of its main loop,
    bytes copied from and to HBM, and the query-key pairs of a tile.
    """

    regions: dict[str, int]
    launches: int
    dma_bytes: int
    tile_pairs: int


def document_lengths(length: int, mean: int) -> list[list[int]]:
    """Of each row; they add up to `length`."""
    if mean == 0:
        return [[length]] * ROWS
    return json.loads(Path(__file__).with_name("document_lengths.json").read_text())[str(length)][str(mean)]


def cached(length: int) -> np.ndarray:
    """int32 [rows], the positions of a cache of `length` that each row of a decoding batch has filled."""
    return np.array([round(share * length) for share in FILLED], np.int32)


def segment_ids(length: int, mean: int) -> np.ndarray:
    """int32 [rows, length], documents count from 1."""
    return np.array(
        [np.repeat(np.arange(1, len(row) + 1), row) for row in document_lengths(length, mean)], dtype=np.int32
    )
