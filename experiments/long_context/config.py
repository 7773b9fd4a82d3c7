"""The model of experiments/long_context/run.sh: an AR model of configs/ar.py, on answers about haystacks.

--config=experiments/long_context/config.py:short     # rows of 256 tokens, from random weights
--config=experiments/long_context/config.py:long      # rows of 1024, from those
"""

from pathlib import Path

from llada_jax.errors import InputError
from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "ar.py"
LENGTHS = {"short": 256, "long": 1024}


def get_config(stage: str = "short"):
    if stage not in LENGTHS:
        raise InputError(f"config argument: {stage!r}, expected {' or '.join(LENGTHS)}")
    config = load_sibling(str(CONFIGS), "ar").get_config(f"tiny,length={LENGTHS[stage]}")
    config.data.source = config.data.tokenizer = ""
    config.data.patterns = ()
    config.batch.rows = 2048 // LENGTHS[stage]
    config.schedule.steps = 1000 if stage == "short" else 400
    config.optimizer.learning_rate = 1.5e-3 if stage == "short" else 5e-4
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = config.schedule.steps // 4
    config.optimizer.weight_decay = 0.01
    config.checkpoint.every_steps = config.evaluation.every_steps = 200
    config.checkpoint.keep_last = 1
    config.evaluation.rows = 16
    config.log_every_steps = 50
    return config
