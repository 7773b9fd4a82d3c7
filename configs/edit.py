"""Supervised fine-tuning that also trains token editing (LLaDA2.1, arXiv 2602.08676, Section 3.1).

    python -m llada_jax.train --config=configs/edit.py --workdir=DIR --config.init_from=CHECKPOINT \
        --config.data.path=ROWS

is configs/sft.py, whose docstring tells how ROWS are made, with wrong tokens beside the masks: up to 30% of a block's
unmasked answer tokens are random ones, and in half of the rows the model's own pass has written what its decoder would
have written at a threshold between 0.3 and 0.95. The loss adds that of all unmasked answer tokens. The paper publishes
none of these numbers. Sample from the result with `tools/generate.py --rule=llada2.1`.

The same keys work in `wsd`, `sft` and `cap` (--config.editing.weight=1 --config.editing.replace_high=0.3). DMax's OPUT:

    --config.editing.turns=2 --config.editing.replace_high=0 --config.editing.draft_share=1 \
        --config.editing.threshold_low=0 --config.editing.threshold_high=0 --config.editing.editing_low=1 \
        --config.editing.editing_high=1 --config.objective.rate_low=0.75 --config.objective.rate_high=0.75 \
        --config.objective.time_weight=uniform --config.objective.complementary=False

Options: length (tokens per row), steps.
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("edit", argument)
