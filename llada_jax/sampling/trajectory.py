"""How an answer filled: its blocks, each token coloured by the step of its block that wrote it."""

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from llada_jax import plots
from llada_jax.sampling.history import History
from llada_jax.tokenizer import Tokenizer

_COLORS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")  # early to late


def blocks(prompt_length: int, tokens, block_length: int) -> list[slice]:
    """Returns slices of an answer's tokens, one per block; blocks count from the start of the prompt."""
    ends = range((prompt_length // block_length + 1) * block_length, prompt_length + len(tokens), block_length)
    edges = [0, *(end - prompt_length for end in ends), len(tokens)]
    return [slice(start, end) for start, end in zip(edges, edges[1:], strict=False) if start < end]


def color(step: int, steps: int) -> str:
    """Hex colour of a step (0-based) of a block that took `steps`."""
    return _COLORS[round(step / max(steps - 1, 1) * (len(_COLORS) - 1))]


def terminal(pieces: list[str], steps: np.ndarray, spans: list[slice]) -> Text:
    """Returns coloured text, one line per block, early tokens dark. pieces: text of each token; steps: written_at."""
    text, most = Text(), int(steps.max(initial=0)) + 1
    for number, span in enumerate(spans, 1):
        text.append(f"block {number:3} {int(steps[span].max()) + 1:3} steps  ", "dim")
        for piece, step in zip(pieces[span], steps[span], strict=True):
            shade = color(int(step), most)
            ink = "black" if step / max(most - 1, 1) > 0.6 else "white"
            text.append(piece.replace("\n", "⏎").replace(" ", "·") or "∅", f"{ink} on {shade}")
        text.append("\n")
    return text


def writes(
    ids: Sequence[int],
    tokens: np.ndarray,
    steps: np.ndarray,
    confidence: np.ndarray,
    spans: list[slice],
    tokenizer: Tokenizer,
    history: History | None = None,
) -> list[list]:
    """Returns [position in the answer, pass, step of the block, text, probability] of every write, in their order:
    numbers from 0, the probability rounded to 2 places. What is behind the end of the answer is left out.

    ids: of the prompt. tokens, steps, confidence [n]: of the answer, as in batching.Answer. history: with it drafts
    before an edit and the passes of several blocks at once are told; without it each token is written once, and a
    block after the other.
    """
    if history is None:
        passes, before = np.array(steps), 0
        for span in spans:
            passes[span] += before
            before = int(passes[span].max()) + 1
        order = np.argsort(passes, kind="stable")
        history = History(order, *(np.asarray(each)[order] for each in (tokens, steps, passes, confidence)))
    known, kept = [*ids, *tokens.tolist()], history.position < len(tokens)
    return [
        [int(at), int(forward), int(step), tokenizer.text.piece(known[: len(ids) + at], token), round(float(p), 2)]
        for at, token, step, forward, p in zip(*(array[kept] for array in history), strict=True)
    ]


def draw(pieces: list[str], steps: np.ndarray, confidence: np.ndarray, spans: list[slice], path: str) -> None:
    """Writes a picture to `path`, .svg or .png: one row per block, one cell per token with its text."""
    pyplot = plots.open_pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    widest = max(span.stop - span.start for span in spans)
    most = int(steps.max(initial=0)) + 1
    figure, axes = pyplot.subplots(figsize=(min(0.42 * widest, 16) + 1.6, 0.42 * len(spans) + 1.4))
    for row, span in enumerate(spans):
        for column, i in enumerate(range(span.start, span.stop)):
            shade = color(int(steps[i]), most)
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=shade, edgecolor="white", linewidth=0.8))
            ink = "black" if steps[i] / max(most - 1, 1) > 0.6 else "white"
            label = (pieces[i].strip() or "·").replace("$", r"\$")[:6]
            axes.text(column + 0.5, row + 0.42, label, ha="center", va="center", fontsize=7, color=ink)
            axes.text(
                column + 0.5, row + 0.8, f"{confidence[i]:.2f}", ha="center", va="center", fontsize=4.5, color=ink
            )
    axes.set(xlim=(0, widest), ylim=(len(spans), 0), xticks=[], yticks=np.arange(len(spans)) + 0.5)
    axes.set_yticklabels([f"block {n + 1}, {int(steps[s].max()) + 1} steps" for n, s in enumerate(spans)], fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    passes = sum(int(steps[span].max()) + 1 for span in spans)
    axes.set_title(
        f"{len(steps)} tokens in {passes} steps, with the probability at which each was written", fontsize=10
    )
    shades = ListedColormap([color(step, most) for step in range(most)])
    scale = pyplot.cm.ScalarMappable(pyplot.Normalize(0.5, most + 0.5), shades)
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.35 / (len(spans) + 1), pad=0.03)
    bar.set_ticks(sorted({round(tick) for tick in np.linspace(1, most, min(most, 8))}))
    bar.set_label("step of the block", fontsize=8)
    plots.save(figure, path, bbox_inches="tight")
