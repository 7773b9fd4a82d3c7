"""The shortened curriculum of experiments/quickstart/run.sh: a demonstration on two CPU cores, not a conversion.

SmolLM2-135M sees 27 thousand tokens in about six minutes: enough for the held-out NELBO to fall at every block
size, far from enough for fluent samples. The real curriculum of the same model is configs/wsd.py:smollm2_135m.
"""

from llada_jax.training.config import default_config


def get_config(argument=None):
    config = default_config(argument or "smollm2_135m")
    config.stage = "wsd"
    config.data.length = 128
    config.batch.rows = 2
    config.schedule.warmup_blocks = (1, 4, 32, 64)
    config.schedule.warmup_steps = (25, 25, 15, 5)
    config.schedule.stable_steps = 20
    config.schedule.decay_blocks = (64, 32)
    config.schedule.decay_steps = (5, 10)
    config.objective.masking = "fixed_count"  # the same expectation as the paper's Bernoulli masks, less variance
    config.objective.spread = True
    config.optimizer.learning_rate = 4e-5
    config.optimizer.warmup_steps = 10
    config.optimizer.decay_steps = 60
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 1
    config.evaluation.every_steps = 1000
    config.evaluation.block_sizes = (32,)
    config.evaluation.rows = 4
    config.log_every_steps = 5
    return config
