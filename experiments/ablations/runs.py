"""What is trained, and which runs an ablation compares. A run is a point of a sweep: fields of the config, changed."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Run:
    """stage: of config.py. start: of text, a checkpoint (base.start); of answers, a stage of experiments/post_training.
    fields: {field of the config: value}. merge: train nothing, take the mean of so many best steps of the run `wsd`.
    """

    stage: str
    start: str
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    merge: int = 0

    @property
    def of_text(self) -> bool:
        return self.stage == "wsd"


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure. key: of a record's scores, or "gradient_norm"; scale: what a score is shown times."""

    key: str
    heading: str
    digits: int = 3
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Ablation:
    """runs: {name of a run: its label}, the first being what the others are compared with, by the columns `compared`
    (their keys). gradients: the picture has the gradient's norm over the steps too. elsewhere: the runs are stages of
    experiments/post_training, which has recorded them.
    """

    title: str
    runs: Mapping[str, str]
    columns: tuple[Column, ...]
    compared: tuple[str, ...]
    gradients: bool = False
    elsewhere: bool = False


_CONSTANT = {"schedule.kind": "constant"}
_NOISE = {"objective.embedding_noise_std": 0.02, "objective.embedding_noise_steps": 40}

RUNS = {
    # Steps are kept for the merge: no other effect. The best five are those of the last blocks of the curriculum.
    "wsd": Run("wsd", "ar", {"checkpoint.every_steps": 5, "checkpoint.keep_best": 5}),
    "merge_1": Run("wsd", "ar", merge=1),
    "merge_3": Run("wsd", "ar", merge=3),
    "merge_5": Run("wsd", "ar", merge=5),
    "mdlm": Run("wsd", "ar", _CONSTANT | {"schedule.block_size": 128}),
    "block_32": Run("wsd", "ar", _CONSTANT),
    "from_scratch": Run("wsd", "random"),
    "no_document_mask": Run("wsd", "ar", {"objective.document_mask": False}),
    "zero_mask": Run("wsd", "ar_zero_mask"),
    "zero_mask_noise": Run("wsd", "ar_zero_mask", _NOISE),
    "same": Run("wsd", "ar", {"alignment": "same"}),
    "document_origin": Run("wsd", "ar", {"objective.block_origin": "document"}),
    "sft": Run("sft", "wsd"),
    "band_wide": Run("sft", "wsd", {"objective.rate_low": 1e-3, "objective.rate_high": 1.0}),
}

_NELBO = {key: Column(key, f"block {key}") for key in ("1", "4", "32")}
_FULL = Column("full", "full sequence")
_BLOCKS = (*_NELBO.values(), _FULL)
_ANSWERS = (
    Column("right", "right answers, %", 1, 100),
    Column("tokens_per_forward", "tokens per forward", 2),
    Column("nelbo", "answers, nats per token"),
)
_ANSWERED = ("right", "tokens_per_forward")

ABLATIONS = {
    "curriculum": Ablation(
        "Warmup-Stable-Decay against shorter ways, at equal tokens",
        {
            "wsd": "WSD",
            "mdlm": "straight to MDLM",
            "block_32": "straight to blocks of 32",
            "from_scratch": "WSD, from random weights",
        },
        _BLOCKS,
        ("1", "32", "full"),
    ),
    "document_mask": Ablation(
        "Document mask",
        {"wsd": "with", "no_document_mask": "without"},
        (_NELBO["32"], Column("32 unmasked", "block 32, scored without the mask"), _FULL),
        ("32", "full"),
    ),
    "mask_noise": Ablation(
        "Noise on the mask token's embedding",
        {
            "zero_mask": "zero row, no noise",
            "zero_mask_noise": "zero row, noise",
            "wsd": "row as initialised, no noise",
        },
        (Column("gradient_norm", "gradient norm, warm-up", 1), _NELBO["4"], _NELBO["32"], _FULL),
        ("gradient_norm", "32"),
        gradients=True,
    ),
    "merge": Ablation(
        "Top-k checkpoint merge",
        {"wsd": "last step", "merge_1": "k = 1", "merge_3": "k = 3", "merge_5": "k = 5"},
        _BLOCKS,
        ("32", "full"),
    ),
    "alignment": Ablation(
        "Alignment of logits and tokens",
        {"wsd": "shifted, as AR", "same": "same, as LLaDA2"},
        _BLOCKS,
        ("1", "32", "full"),
    ),
    "block_origin": Ablation(
        "Where blocks begin",
        {"wsd": "with the row (Eq. 3)", "document_origin": "with the document"},
        (_NELBO["4"], _NELBO["32"], Column("32 document", "block 32, scored from the document's beginning")),
        ("32", "32 document"),
    ),
    "complementary": Ablation(
        "Complementary masking, at equal masked positions",
        {"sft": "pairs", "sft_single": "single masks of twice the rows"},
        _ANSWERS,
        _ANSWERED,
        elsewhere=True,
    ),
    "mask_band": Ablation(
        "Band of mask ratios",
        {"sft": "[0.3, 0.8]", "band_wide": "[0.001, 1]"},
        _ANSWERS,
        _ANSWERED,
    ),
    "cap": Ablation(
        "Weight of the confidence term (CAP)",
        {"sft_longer": "0", "cap": "2"},
        _ANSWERS,
        _ANSWERED,
        elsewhere=True,
    ),
}  # fmt: skip


def runs_of(names) -> list[str]:
    """The runs that the ablations of these names need, each once, in the order of RUNS."""
    needed = {run for name in names for run in ABLATIONS[name].runs if not ABLATIONS[name].elsewhere}
    if any(RUNS[name].merge for name in needed):
        needed.add("wsd")
    return [name for name in RUNS if name in needed]
