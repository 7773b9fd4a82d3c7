"""The stages of experiments/post_training/run.sh: the configs of configs/, shortened.

    python -m llada_jax.train --config=experiments/post_training/config.py:STAGE,MODEL --workdir=DIR \
        --config.data.path=ROWS --config.seed=SEED [--config.init_from=DIR_OF_THE_STAGE_BEFORE]

STAGE: ar, wsd, sft, sft_single (one mask per row, twice the rows: as many positions as sft), cap, sft_longer (cap
without its confidence term: what the same steps give alone), dpo. Blocks have 16 tokens, as the answers are short.
MODEL: tiny, for CPU; or smollm2_135m, from the real AR weights (no stage ar), for an accelerator: four times the steps
on thirty-two times the tokens, 616 M tokens of WSD.
"""

from llada_jax.errors import InputError
from llada_jax.training import stages

BLOCK = 16
STAGES = ("ar", "wsd", "sft", "sft_single", "cap", "sft_longer", "dpo")
MODELS = {"tiny": 128, "smollm2_135m": 256}  # tokens per row


def get_config(argument: str = "sft"):
    stage, _, model = argument.partition(",")
    model = model or "tiny"
    if stage not in STAGES or model not in MODELS:
        raise InputError(
            f"config argument: {argument!r}, expected one of {', '.join(STAGES)}, and {' or '.join(MODELS)}"
        )
    function = stages.STAGES["sft" if stage in ("sft_single", "sft_longer") else stage]
    config = function(model, length=MODELS[model])
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
    {"ar": _ar, "wsd": _wsd, "sft": _sft, "sft_single": _sft, "dpo": _dpo}.get(stage, _cap)(config)
    if model != "tiny":
        _accelerator(config)
    if stage == "sft_single":
        config.objective.complementary = False
        config.batch.rows *= 2
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


def _sft(config):
    config.schedule.block_size = BLOCK
    config.schedule.steps = 800
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 30
    config.optimizer.decay_steps = 400


def _cap(config):
    _sft(config)
    config.schedule.steps = 400
    config.optimizer.learning_rate = 2e-4
    config.optimizer.decay_steps = 200


def _dpo(config):
    _sft(config)
    config.schedule.steps = 100
    config.batch.rows = 4
    config.preference.draws = 4
    config.optimizer.learning_rate = None  # where CAP ended, 2e-5
    config.optimizer.warmup_steps = 5
    config.optimizer.decay_steps = 50
    config.evaluation.every_steps = 50


def _accelerator(config):
    """The same shape of run at a real size, in bfloat16."""
    many, more = 16, 4
    config.batch.rows *= many
    for field in ("warmup_steps", "decay_steps"):
        config.schedule[field] = tuple(more * steps for steps in config.schedule[field])
        config.optimizer[field] *= more
    config.schedule.stable_steps *= 20
    config.schedule.steps *= more
    if config.optimizer.learning_rate is not None:  # DPO goes on where CAP ended
        config.optimizer.learning_rate /= 5
    config.execution.dtype = "bfloat16"
    config.execution.attention = "auto"
    config.checkpoint.every_steps = config.evaluation.every_steps = 1000
