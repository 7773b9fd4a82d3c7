"""The conversion of SmolLM2-135M that experiments/conversion/run.sh runs, in two forms.

cpu: the curriculum of experiments/quickstart_config.py at twice the steps, 51 thousand tokens.
gpu: the curriculum of configs/wsd.py on rows of 1024 tokens, 65 thousand tokens a step, 249 million in all.

Both keep checkpoints at even distances, to be measured along the way.
"""

from pathlib import Path

from llada_jax.errors import InputError
from llada_jax.training.config import load_sibling

HERE = Path(__file__).resolve().parent


def get_config(argument="cpu"):
    if argument == "cpu":
        config = load_sibling(str(HERE.parent / "quickstart.sh"), "quickstart_config").get_config()
        config.schedule.warmup_steps = (50, 40, 30, 10)
        config.schedule.stable_steps = 30
        config.schedule.decay_steps = (10, 30)
        config.checkpoint.every_steps = config.checkpoint.keep_every = 40
    elif argument == "gpu":
        config = load_sibling(str(HERE.parent.parent / "configs" / "wsd.py"), "wsd").get_config(
            "smollm2_135m,length=1024"
        )
        config.batch.rows = 64
        config.data.held_out_rows = 64  # as many as run.sh scores
        config.schedule.warmup_steps = (200,) * len(config.schedule.warmup_blocks)
        config.schedule.stable_steps = 2000
        config.schedule.decay_steps = (200,) * len(config.schedule.decay_blocks)
        config.optimizer.decay_steps = sum(config.schedule.decay_steps)
        config.objective.masking, config.objective.spread_times = "fixed_count", True
        config.checkpoint.every_minutes = 2.0  # a run that is cut off loses no more
        config.checkpoint.every_steps = config.checkpoint.keep_every = 380
    else:
        raise InputError(f"config argument: {argument!r}, expected cpu or gpu")
    config.checkpoint.keep_last = 1
    return config
