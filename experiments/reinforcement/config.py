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

BLOCK, LENGTH = 16, 48  # questions have up to 18 tokens
ESTIMATORS = ("elbo", "trajectory")


def get_config(estimator: str = "trajectory"):
    if estimator not in ESTIMATORS:
        raise InputError(f"config argument: {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    config = stages.rl("init_from", length=LENGTH, steps=300)
    config.rl.estimator = estimator
    config.rl.questions = f"reasoning_gym:{task.NAME}"
    config.rl.settings = json.dumps(task.SETTINGS)
    config.rl.gen_length = 16
    config.rl.rows = 256
    config.rl.group = 4
    # Which positions are written depends on the probabilities alone, not on what is drawn for them: the scores of a
    # trajectory are those of the policy. By confidence, the rule of evaluation, likely draws are written first.
    config.rl.rule = "entropy"
    config.rl.entropy_bound = 0.05
    config.rl.copies = 4
    config.rl.held_out = 500
    config.rl.drift_rows = 2
    config.batch.rows = 256
    config.batch.micro_batches = 4
    config.schedule.block_size = BLOCK
    # The rate at which SFT ended: at larger ones the noise of so few answers costs more than it teaches.
    config.optimizer.learning_rate = 5e-5
    config.optimizer.b2 = 0.98
    config.optimizer.warmup_steps = 10
    config.optimizer.decay_steps = 150
    config.execution.update(dtype="float32", attention="dense", remat="none")
    config.checkpoint.every_steps = 50
    config.evaluation.every_steps = 50
    return config
