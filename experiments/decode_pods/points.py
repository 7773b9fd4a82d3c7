"""What is rehearsed of decoding: passes, and chunks of prompts, of LLaDA2.0-mini and -flash on small TPU slices.

Requests have 4,096 positions, of which 2,048 are cached, and blocks of 32; the mesh is the one that generate takes. A
chunk is of 1,024 tokens of a prompt of at most 8,192, one prompt on each part of the requests.
"""

import dataclasses

ROWS = (1, 4, 16, 64, 256)
FILLED, CANVAS = 2048, 4096
CHUNK, LONGEST = 1024, 8192
BEFORE = (0, 4096)  # tokens of the prompt before the chunk
OF_A_PASS = (1, 2.55, 4)  # tokens accepted: of AR, of LLaDA2.0-mini at threshold 0.95 (its model card), and more


@dataclasses.dataclass(frozen=True)
class Slice:
    """preset: of llada_jax.model.config."""

    preset: str
    topology: str


SLICES = {
    "mini_v5p": Slice("llada2_mini", "v5p:2x2x1"),
    "mini_v6e": Slice("llada2_mini", "v6e:2x4"),
    "mini_tpu7x": Slice("llada2_mini", "tpu7x:2x2x1"),
    "flash_v5p": Slice("llada2_flash", "v5p:2x2x2"),
    "flash_v6e": Slice("llada2_flash", "v6e:4x4"),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """rows: requests of a pass of decoding; before: tokens of a prompt before a chunk. One of them is None."""

    slice: str
    rows: int | None = None
    before: int | None = None

    @property
    def key(self) -> str:
        """In results/SLICE.json."""
        return f"rows {self.rows}" if self.before is None else f"chunk after {self.before}"


POINTS = [
    *(Point(name, rows=rows) for name in SLICES for rows in ROWS),
    *(Point(name, before=before) for name in SLICES for before in BEFORE),
]
