"""The runs of the ablations before anything is changed: the stages of configs/, shortened.

    python -m llada_jax.train --config=experiments/ablations/config.py:STAGE,MODEL --workdir=DIR \
        --config.data.path=ROWS --config.seed=SEED --config.init_from=CHECKPOINT

STAGE: ar, wsd; or sft, that of experiments/post_training in a twentieth of the steps on half the rows.
MODEL: tiny, for a CPU core; or smollm2_135m, from the real AR weights (no stage ar), for an accelerator.
`python experiments/ablations/run.py --dry_run` prints the command of every run.
"""

from pathlib import Path

from llada_jax import config_flag
from llada_jax.errors import InputError
from llada_jax.training import stages

POST_TRAINING = Path(__file__).resolve().parents[1] / "post_training" / "config.py"
STAGES = ("ar", "wsd", "sft")
MODELS = ("tiny", "smollm2_135m")
LENGTH = {"ar": 256, "wsd": 128}  # tokens per row: a conversion attends over two copies of it


def get_config(argument: str = "wsd"):
    stage, _, model = argument.partition(",")
    model = model or "tiny"
    if stage not in STAGES or model not in MODELS:
        raise InputError(
            f"config argument: {argument!r}, expected one of {', '.join(STAGES)}, and {' or '.join(MODELS)}"
        )
    config = _text(stage, model) if stage in ("ar", "wsd") else _answers(stage, model)
    config.evaluation.every_steps = config.checkpoint.every_steps = 10_000  # at the end only
    config.checkpoint.keep_last = 1
    config.evaluation.rows = 16  # the others are for experiments/ablations/run.py
    config.log_every_steps = 1
    return config


def _text(stage: str, model: str):
    """Functions of the standard library."""
    config = stages.STAGES[stage](model, length=LENGTH[stage])
    config.data.source = ""
    config.data.patterns = ()
    config.data.tokenizer = ""
    config.data.held_out_rows = 16_384 // LENGTH[stage]  # the same text
    config.evaluation.block_sizes = (1,) if stage == "ar" else (32,)
    config.optimizer.weight_decay = 0.01
    if stage == "ar":
        config.schedule.steps = 1200
        config.batch.rows = 8
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 50
        config.optimizer.decay_steps = 400
        return config
    config.batch.rows = 8
    _curriculum(config, 1)
    config.objective.embedding_noise_std = 0.0
    config.objective.embedding_noise_steps = 0
    config.optimizer.learning_rate = 1e-3
    if model != "tiny":
        _curriculum(config, 10)
        config.batch.rows = 128
        config.optimizer.learning_rate = 2e-4
    return config


def _curriculum(config, times: int) -> None:
    """100 steps of Warmup-Stable-Decay, so many times longer; constant block sizes train as long."""
    config.schedule.warmup_blocks = (1, 4, 32, 64)
    config.schedule.warmup_steps = (10 * times,) * 4
    config.schedule.stable_steps = 30 * times
    config.schedule.decay_blocks = (64, 32)
    config.schedule.decay_steps = (8 * times, 22 * times)
    config.schedule.block_size = 32
    config.schedule.steps = 100 * times
    config.optimizer.warmup_steps = 5 * times
    config.optimizer.decay_steps = 30 * times


def _answers(stage: str, model: str):
    """Questions of reasoning-gym, supervised on the answers: experiments/post_training/config.py, shortened."""
    config = config_flag.load([f"--config={POST_TRAINING}:{stage},{model}"])
    config.batch.rows //= 2
    config.schedule.steps //= 20
    config.optimizer.warmup_steps //= 3
    config.optimizer.decay_steps //= 20
    return config
