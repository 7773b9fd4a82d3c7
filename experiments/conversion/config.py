"""The conversion of SmolLM2-135M that experiments/conversion/run.sh runs, in three forms.

cpu: the curriculum of experiments/quickstart/config.py at twice the steps, 51 thousand tokens.
h200: the curriculum of configs/wsd.py in short, 179 steps of 32 rows of 1024 tokens, 5.9 million in all.
gpu: the same curriculum, 65 thousand tokens per step, 249 million in all.

All keep checkpoints at even distances, which run.sh measures.
"""

from pathlib import Path

from llada_jax import config_flag
from llada_jax.errors import InputError
from llada_jax.training import stages

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart" / "config.py"


def get_config(argument="cpu"):
    if argument == "cpu":
        config = config_flag.load([f"--config={QUICKSTART}"])
        config.schedule.warmup_steps = (50, 40, 30, 10)
        config.schedule.stable_steps = 30
        config.schedule.decay_steps = (10, 30)
        config.checkpoint.every_steps = config.checkpoint.keep_every = 40
    elif argument == "h200":
        config = _accelerator(rows=32, warmup=13, stable=77, decay=10, every=45)
        config.optimizer.learning_rate = 2e-4
        config.optimizer.warmup_steps = 50
        config.objective.embedding_noise_steps = 100
        config.evaluation.every_steps = 179
    elif argument == "gpu":
        config = _accelerator(rows=64, warmup=200, stable=2000, decay=200, every=380)
        config.checkpoint.every_minutes = 2.0  # a run that is cut off loses no more
    else:
        raise InputError(f"config argument: {argument!r}, expected cpu, h200 or gpu")
    config.checkpoint.keep_last = 1
    return config


def _accelerator(rows: int, warmup: int, stable: int, decay: int, every: int):
    """The curriculum of configs/wsd.py on rows of 1024 tokens: steps of each phase, and between kept checkpoints."""
    config = stages.wsd("smollm2_135m", length=1024)
    config.batch.rows = rows
    config.data.held_out_rows = 64  # as many as run.sh scores
    config.schedule.warmup_steps = (warmup,) * len(config.schedule.warmup_blocks)
    config.schedule.stable_steps = stable
    config.schedule.decay_steps = (decay,) * len(config.schedule.decay_blocks)
    config.optimizer.decay_steps = sum(config.schedule.decay_steps)
    config.objective.masking, config.objective.spread = "fixed_count", True
    config.execution.attention = "dense"  # on an H200, at this length, 4.8 times as fast as "blockwise"
    config.checkpoint.every_steps = config.checkpoint.keep_every = every
    return config
