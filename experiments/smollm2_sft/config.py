"""The run of run.sh: LoRA SFT of SmolLM2-135M-Instruct as a block-diffusion model, in blocks of 8 tokens."""

from llada_jax.training import stages


def get_config(argument=None):
    config = stages.parse("sft", argument or "smollm2_135m,length=128,steps=60")
    config.execution.dtype = "float32"
    config.execution.attention = "dense"
    config.execution.remat = "none"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.schedule.block_size = 8
    config.objective.rate_low = 0.1
    config.objective.rate_high = 1.0
    config.objective.time_weight = "uniform"
    config.batch.rows = 1
    config.data.held_out_rows = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 10
    config.optimizer.decay_steps = 20
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 1
    config.evaluation.every_steps = 1000
    config.evaluation.block_sizes = (8,)
    config.evaluation.rows = 8
    config.log_every_steps = 5
    return config
