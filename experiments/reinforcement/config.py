"""Reinforcement learning of the small models of experiments/post_training, on the task that they were taught.

    python -m llada_jax.train --config=experiments/reinforcement/config.py:ESTIMATOR --workdir=DIR \
        --config.init_from=DIR_OF_SFT_OR_CAP --config.seed=SEED

ESTIMATOR: elbo or trajectory. Both take as many answers; run.sh runs both from SFT and from CAP.
"""

import json
import sys
from pathlib import Path

from llada_jax.errors import InputError
from llada_jax.training import stages

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))
import task  # noqa: E402 (of experiments/post_training)

BLOCK, LENGTH = 16, 64  # questions have up to 20 tokens
ESTIMATORS = ("elbo", "trajectory")


def get_config(estimator: str = "trajectory"):
    if estimator not in ESTIMATORS:
        raise InputError(f"config argument: {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    config = stages.rl("init_from", length=LENGTH, steps=60)
    config.rl.estimator = estimator
    config.rl.questions = f"reasoning_gym:{task.NAME}"
    config.rl.settings = json.dumps(task.SETTINGS)
    config.rl.gen_length = 32
    config.rl.rows = 128
    config.rl.updates = 2
    config.rl.copies = 4
    config.rl.shrink = 4
    config.rl.held_out = 200
    config.rl.drift_rows = 2
    config.batch.rows = 512  # 64 questions, as two groups in three have no signal
    config.schedule.block_size = BLOCK
    config.optimizer.learning_rate = 6e-5
    config.optimizer.warmup_steps = 10  # updates: Adam's first ones are as large as the rate, whatever the gradient
    config.execution.update(dtype="float32", attention="dense", remat="none")
    config.checkpoint.every_steps = 20
    config.evaluation.every_steps = 20
    return config
