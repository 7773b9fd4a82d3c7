"""Pictures of the block-diffusion mask (Figure 2 of the paper) for packed documents."""

import itertools

import numpy as np

from llada_jax import plots
from llada_jax.attention.visibility import block_diffusion_mask

HIDDEN, NOISY_NOISY, NOISY_CLEAN, CLEAN_CLEAN = range(4)
_COLORS = {NOISY_NOISY: "#e8871e", NOISY_CLEAN: "#4c86c6", CLEAN_CLEAN: "#4a9d6f"}
_INK, _GRID = "#2b2f36", "#e4e7ec"
_LABELS = {
    NOISY_NOISY: "noisy query, its own noisy block",
    NOISY_CLEAN: "noisy query, the clean blocks before its own",
    CLEAN_CLEAN: "clean query, clean blocks up to its own",
}


def kinds(documents: list[int], block_size: int, block_origin: str = "global") -> np.ndarray:
    """Returns int [2 * length, 2 * length]: HIDDEN, or the halves that the query and the key belong to."""
    length = sum(documents)
    segments = np.repeat(np.arange(1, len(documents) + 1), documents)
    mask = block_diffusion_mask(length, block_size, segments, block_origin)
    clean_query, clean_key = np.arange(2 * length)[:, None] >= length, np.arange(2 * length)[None] >= length
    kind = np.where(clean_query, CLEAN_CLEAN, np.where(clean_key, NOISY_CLEAN, NOISY_NOISY))
    return np.where(mask, kind, HIDDEN)


def text(kind: np.ndarray) -> str:
    """Returns text with one character per query and key, and rules between the noisy and the clean half."""
    half = len(kind) // 2
    lines = ["".join(".nxc"[k] for k in row[:half]) + "|" + "".join(".nxc"[k] for k in row[half:]) for row in kind]
    return "\n".join(lines[:half] + ["-" * half + "+" + "-" * half] + lines[half:])


def draw(kind: np.ndarray, documents: list[int], block_size: int, path: str) -> None:
    """Writes the picture to `path`, .svg or .png."""
    pyplot = plots.open_pyplot()
    from matplotlib.patches import Patch, Rectangle

    size = len(kind)
    figure, axes = pyplot.subplots(figsize=(6.4, 6.4))
    for color, start, end, row in _runs(kind):
        axes.add_patch(Rectangle((start, row), end - start, 1, facecolor=_COLORS[color], linewidth=0))
    if size <= 128:
        axes.hlines(range(1, size), 0, size, color=_GRID, linewidth=0.6)
        axes.vlines(range(1, size), 0, size, color=_GRID, linewidth=0.6)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_color(_INK)
    _rules(axes, documents, size // 2)
    _names(axes, documents, size // 2)
    axes.set_title(
        f"Who sees whom: blocks of {block_size}, {len(documents)} documents", color=_INK, fontsize=13, pad=46
    )
    handles = [Patch(facecolor=_COLORS[k], label=label) for k, label in _LABELS.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, labelcolor=_INK)
    plots.save(figure, path, bbox_inches="tight", pad_inches=0.15)


def _runs(kind: np.ndarray):
    """Yields (kind, first key, end, query) of the runs of equal kind in each row, except hidden ones."""
    for query, row in enumerate(kind):
        key = 0
        for color, run in itertools.groupby(row.tolist()):
            start, key = key, key + len(list(run))
            if color != HIDDEN:
                yield color, start, key, query


def _rules(axes, documents, length: int) -> None:
    """Lines where a document ends, and a thick one between the halves."""
    ends = list(itertools.accumulate(documents))
    for end in (*ends[:-1], length, *(length + end for end in ends[:-1])):
        style = dict(
            color=_INK, linewidth=1.6 if end == length else 0.7, linestyle="-" if end == length else (0, (4, 3))
        )
        axes.axhline(end, **style)
        axes.axvline(end, **style)


def _names(axes, documents, length: int) -> None:
    """Names of the halves and of the documents, above and to the left."""
    small = dict(color=_INK, fontsize=8.5, ha="center", va="center")
    starts = [0, *itertools.accumulate(documents)][:-1]
    gap = 2 * length
    for half, name in enumerate(("noisy  $x_t$", "clean  $x_0$")):
        middle = (half + 0.5) * length
        axes.text(middle, -0.065 * gap, name, color=_INK, fontsize=11, ha="center", va="center")
        axes.text(-0.065 * gap, middle, name, color=_INK, fontsize=11, ha="center", va="center", rotation=90)
        for number, (start, count) in enumerate(zip(starts, documents, strict=True), 1):
            label = f"doc {number}" if count >= 0.08 * gap else str(number)
            axes.text(half * length + start + count / 2, -0.022 * gap, label, **small)
            axes.text(-0.022 * gap, half * length + start + count / 2, label, **small, rotation=90)
