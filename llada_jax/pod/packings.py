"""The fixed rows for which attention is costed; their document lengths are stored beside this file.

The lengths were drawn once from a lognormal distribution with sigma 1 and packed as documents are: one after the other,
the last one cut at the end of the row, none aligned to blocks.

    lengths = numpy.random.default_rng([length, mean]).lognormal(numpy.log(mean) - 0.5, 1, ...)   # rounded, at least 1
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

LENGTHS = (2048, 4096, 8192)
LONG_LENGTHS = (32_768, 65_536)  # for rehearsals only: the bench takes all keys of a row at once
MEANS = (0, 512, 1024)  # tokens; 0: one document per row
ROWS = 16
# Decoding: the filled share of the cache, per row of a batch.
FILLED = tuple((2 * row + 1) / (2 * ROWS) for row in range(ROWS))


@dataclasses.dataclass(frozen=True)
class KernelCounts:
    """What a kernel executes for one row, over all heads.

    regions: executions per region, "step" included. launches: entries of the main loop. dma_bytes: copied from and to
    HBM. tile_pairs: query-key pairs per tile.
    """

    regions: dict[str, int]
    launches: int
    dma_bytes: int
    tile_pairs: int


def document_lengths(length: int, mean: int) -> list[list[int]]:
    """The document lengths of each row; they add up to `length`."""
    if mean == 0:
        return [[length]] * ROWS
    return json.loads(Path(__file__).with_name("document_lengths.json").read_text())[str(length)][str(mean)]


def cached(length: int) -> np.ndarray:
    """int32 [rows]: the filled positions of each row's cache of `length`, in a decoding batch."""
    return np.array([round(share * length) for share in FILLED], np.int32)


def segment_ids(length: int, mean: int) -> np.ndarray:
    """int32 [rows, length]; documents are numbered from 1."""
    return np.array(
        [np.repeat(np.arange(1, len(row) + 1), row) for row in document_lengths(length, mean)], dtype=np.int32
    )
