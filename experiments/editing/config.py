"""What is fine-tuned to compare: SFT of experiments/post_training, with token editing or with blocks in groups.

    python -m llada_jax.train --config=experiments/editing/config.py:VARIANT --workdir=DIR --config.data.path=ROWS \
        --config.init_from=WSD --config.seed=SEED

VARIANT: a name in VARIANTS. All start from the WSD model of experiments/post_training and take the steps of its SFT;
run.sh trains them one after the other.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from llada_jax import config_flag
from llada_jax.errors import InputError
from llada_jax.training import stages

POST_TRAINING = Path(__file__).resolve().parents[1] / "post_training" / "config.py"
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
GROUP_BLOCK = 4  # answers have 7 tokens on average: several blocks


@dataclasses.dataclass(frozen=True)
class Variant:
    """label: in tables. fields: {field of the config: value} that differ from SFT. block: tokens, of training and
    decoding. active: numbers of active blocks that it decodes with.
    """

    label: str
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    block: int = 16
    active: tuple[int, ...] = (1,)


_EDIT = {f"editing.{name}": value for name, value in stages.edit("tiny").editing.items()}
_OPUT = {
    "editing.weight": 1.0, "editing.turns": 2, "editing.threshold_low": 0.0, "editing.threshold_high": 0.0,
    "editing.editing_low": 1.0, "editing.editing_high": 1.0, "objective.rate_low": 0.75, "objective.rate_high": 0.75,
    "objective.time_weight": "uniform", "objective.complementary": False, "batch.rows": 16,
}  # fmt: skip
# Of groups: one mask per row, twice the rows, as a pair's inverse rates would fall along a group.
_SINGLE = {
    "schedule.block_size": GROUP_BLOCK, "objective.complementary": False, "objective.rate_low": 1e-3,
    "objective.rate_high": 0.99, "objective.time_weight": "uniform", "batch.rows": 16,
    "evaluation.block_sizes": (GROUP_BLOCK,),
}  # fmt: skip
_GROUPS = _SINGLE | {"objective.times": "chain"}

VARIANTS = {
    "sft": Variant("SFT"),
    "edit": Variant("editing: w = 1, q = 0.5, K = 2", _EDIT),
    "edit_w03": Variant("w = 0.3", _EDIT | {"editing.weight": 0.3}),
    "edit_q0": Variant("q = 0: random wrong tokens only, K = 1", _EDIT | {"editing.turns": 1}),
    "edit_q1": Variant(
        "q = 1, no random wrong tokens", _EDIT | {"editing.draft_share": 1.0, "editing.replace_high": 0.0}
    ),
    "edit_k3": Variant("K = 3", _EDIT | {"editing.turns": 3}),
    "oput": Variant("OPUT (DMax)", _OPUT),
    "single": Variant("blocks alone", _SINGLE, GROUP_BLOCK, (1, 2, 4)),
    "group2": Variant("groups of up to 2 blocks", _GROUPS | {"objective.group_blocks": 2}, GROUP_BLOCK, (1, 2, 4)),
    "group4": Variant("groups of up to 4 blocks", _GROUPS | {"objective.group_blocks": 4}, GROUP_BLOCK, (1, 2, 4)),
}


def get_config(name: str = "edit"):
    if name not in VARIANTS:
        raise InputError(f"config argument: {name!r}, expected one of {', '.join(VARIANTS)}")
    config = config_flag.load([f"--config={POST_TRAINING}:sft,tiny"])
    config.stage = name
    config.update_from_flattened_dict(dict(VARIANTS[name].fields))
    return config
