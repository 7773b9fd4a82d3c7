"""The config of runs that are killed again and again: a model of 50 k parameters, and a step to save every few.

    python -m llada_jax.train --config=tests/helpers/soak_config.py:STEPS --workdir=DIR --config.data.source=FOLDER

STEPS: at least 40; half of them at block size 4, half at 16, so that both phases meet a resume.
"""

from llada_jax.model.config import PRESETS, preset
from llada_jax.training.config import default_config


def get_config(argument="200"):
    steps = int(argument)
    PRESETS["soak"] = preset("tiny").replace(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16, intermediate_size=64
    )
    config = default_config("soak")
    config.data.update(tokenizer="bytes", length=32, held_out_rows=4)
    config.batch.rows = 8
    config.schedule.update(
        warmup_blocks=(4,), warmup_steps=(steps // 2,), stable_steps=0, decay_blocks=(16,),
        decay_steps=(steps - steps // 2,),
    )  # fmt: skip
    config.objective.embedding_noise_std = 0.1
    config.objective.embedding_noise_steps = steps // 4
    config.checkpoint.update(every_steps=10, keep_last=3, keep_best=2)
    config.evaluation.update(every_steps=steps // 4, block_sizes=(4, 16), rows=4)
    config.log_every_steps = 3
    return config
