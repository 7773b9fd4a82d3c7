"""The stages of experiments/post_training/run.sh: the configs of configs/, shortened for a 0.9 M parameter model.

    python -m llada_jax.train --config=experiments/post_training/config.py:STAGE --workdir=DIR \
        --config.data.path=ROWS --config.seed=SEED [--config.init_from=DIR_OF_THE_STAGE_BEFORE]

STAGE: ar, wsd, sft, sft_single (one mask a row, twice the rows: as many positions as sft), cap, sft_longer (cap
without its confidence term: what the same steps give alone), dpo. Blocks have 16 tokens, as the answers are short.
"""

from pathlib import Path

from llada_jax.errors import InputError
from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "ar.py"
BLOCK = 16
STAGES = ("ar", "wsd", "sft", "sft_single", "cap", "sft_longer", "dpo")


def get_config(stage: str = "sft"):
    if stage not in STAGES:
        raise InputError(f"config argument: stage {stage!r}, expected one of {', '.join(STAGES)}")
    file = {"sft_single": "sft", "sft_longer": "sft"}.get(stage, stage)
    config = load_sibling(str(CONFIGS), file).get_config("tiny,length=128")
    config.data.source = ""
    config.data.patterns = ()
    config.data.tokenizer = ""
    config.data.held_out_rows = 64
    config.batch.rows = 8
    config.evaluation.every_steps = 250
    config.evaluation.rows = 64
    config.evaluation.block_sizes = (BLOCK,)
    config.checkpoint.every_steps = 250
    config.log_every_steps = 50
    config.optimizer.weight_decay = 0.01
    {"ar": _ar, "wsd": _wsd}.get(stage, _post_training)(config)
    if stage == "sft_single":
        config.objective.complementary = False
        config.batch.rows *= 2
    if stage in ("cap", "sft_longer"):
        config.schedule.steps = 400
        config.optimizer.learning_rate = 2e-4
        config.optimizer.decay_steps = 200
    if stage == "dpo":
        _dpo(config)
    return config


def _ar(config):
    config.schedule.steps = 3000
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 600
    config.evaluation.block_sizes = (1,)


def _wsd(config):
    config.schedule.warmup_blocks = (1, 4, 8, 16, 64)
    config.schedule.warmup_steps = (100, 200, 200, 300, 100)
    config.schedule.stable_steps = 600
    config.schedule.decay_blocks = (64, 32, 16)
    config.schedule.decay_steps = (100, 200, 500)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 800
    config.evaluation.block_sizes = (1, BLOCK)


def _post_training(config):
    config.schedule.block_size = BLOCK
    config.schedule.steps = 800
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 30
    config.optimizer.decay_steps = 400


def _dpo(config):
    config.schedule.steps = 100
    config.batch.rows = 4
    config.preference.draws = 4
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 5
    config.optimizer.decay_steps = 50
    config.evaluation.every_steps = 50
