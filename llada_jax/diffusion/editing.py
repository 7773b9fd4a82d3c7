"""Training of token editing: wrong tokens in x_t, which the model learns to correct (LLaDA2.1, arXiv 2602.08676).

LLaDA2.1's decoder rewrites tokens that it has written (sampling/accept.edits). Section 3.1 of its report trains that by
two streams in one objective: masked tokens are drafted (M2T), and wrong tokens are recovered (T2T); multi-turn forward
(MTF) makes the wrong tokens from the model's own drafts (diffusion/drafts.py).

    L = CE over masked tokens, weighted by 1/t or 1   +   w CE over all unmasked tokens of the answer, wrong or right

The streams and MTF are the report's. Rates, w, q, the number of turns K, and thresholds drawn per row are ours: it
publishes none of them. OPUT (DMax), the only public recipe, is a setting: t fixed at 0.75, w = 1, K = 2, thresholds 0
for drafts and 1 for edits, every term with weight 1, over all tokens of the answer.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.visibility import Layout
from llada_jax.diffusion.noise import REPLACEMENTS, REPLACING, REPLACING_TIMES, uniform
from llada_jax.errors import InputError, check_range

LABELS = ("target", "levenshtein")


@dataclasses.dataclass(frozen=True)
class Editing:
    """How x_t is edited in training. The defaults train no editing. Raises InputError naming the field.

    weight: w. replace_low, replace_high: per block a rate ~ U[low, high], at which each unmasked token of the answer
    becomes a wrong one. turns: K, passes per step; all but the last draft (diffusion/drafts.py). draft_share: q, with
    which probability a row is drafted; other rows keep their masks. threshold_low, threshold_high: of drafting; per row
    the decoder's threshold ~ U[low, high]. editing_low, editing_high: as well, for the edits of the drafts; 1 edits
    nothing. labels: what is predicted in drafted rows, "target", x_0, or "levenshtein", LLaDA2.2's edits that bring the
    draft nearer to x_0 (diffusion/levenshtein.py), in blocks of block_size tokens. special_ids: never written as wrong
    tokens, as the mask and the ends of sequence never are; nor is an id from vocab_size on (None: that of the model).
    """

    weight: float = 0.0
    replace_low: float = 0.0
    replace_high: float = 0.0
    turns: int = 1
    draft_share: float = 1.0
    threshold_low: float = 0.5
    threshold_high: float = 0.95
    editing_low: float = 0.0
    editing_high: float = 0.9
    labels: str = "target"
    block_size: int | None = None
    special_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self):
        check_range("editing.weight", self.weight, at_least=0)
        check_range("editing.turns", self.turns, at_least=1)
        check_range("editing.draft_share", self.draft_share, at_least=0, at_most=1)
        if self.labels not in LABELS:
            raise InputError(f"editing.labels={self.labels!r}, expected one of {', '.join(LABELS)}")
        if self.labels == "levenshtein" and (self.block_size is None or not self.drafts):
            raise InputError('editing.labels="levenshtein": of drafts (editing.turns above 1), in blocks of one size')
        for name in ("replace", "threshold", "editing"):
            low, high = (getattr(self, f"{name}_{end}") for end in ("low", "high"))
            if not 0 <= low <= high <= 1:  # NaN neither
                raise InputError(
                    f"editing.{name}_low={low}, editing.{name}_high={high}, expected 0 <= low <= high <= 1"
                )

    @property
    def replaces(self) -> bool:
        return self.replace_high > 0

    @property
    def drafts(self) -> bool:
        return self.turns > 1 and self.draft_share > 0


def replace_tokens(
    keys: jax.Array, tokens: jax.Array, replaceable: jax.Array, layout: Layout, editing: Editing, barred: Sequence[int]
) -> jax.Array:
    """Returns tokens [batch, length] int32 with wrong ones among the `replaceable` (bool).

    keys [batch]: one per row (noise.example_keys). A wrong token is uniform over the ids below editing.vocab_size that
    are not special, in `barred`, or the right one. Raises InputError where there is none.
    """
    length = tokens.shape[1]
    u = jnp.take_along_axis(uniform(keys, REPLACING_TIMES, length), layout.block_start, axis=1)
    rate = editing.replace_low + (editing.replace_high - editing.replace_low) * u
    replaced = replaceable & (uniform(keys, REPLACING, length) < rate)
    barred = np.unique([i for i in (*barred, *editing.special_ids) if i < editing.vocab_size]).astype(np.int32)
    allowed = editing.vocab_size - len(barred)
    if allowed < 2:
        raise InputError(f"editing: the vocabulary has {allowed} tokens that are not special, expected at least 2")
    at = jnp.searchsorted(barred, tokens)
    right_is_allowed = (tokens < editing.vocab_size) & (jnp.append(barred, -1)[at] != tokens)
    choices = allowed - right_is_allowed
    rank = jnp.minimum((uniform(keys, REPLACEMENTS, length) * choices).astype(jnp.int32), choices - 1)
    rank += right_is_allowed & (rank >= tokens - at)  # passes over the right one
    wrong = rank + jnp.searchsorted(barred - np.arange(len(barred), dtype=np.int32), rank, side="right")
    return jnp.where(replaced, wrong.astype(tokens.dtype), tokens)
