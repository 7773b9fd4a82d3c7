"""The stages of LLaDA2.0 as functions: each returns the training config of a model, to be changed and trained.

    from llada_jax.training import stages

    config = stages.sft("smollm2_135m", length=1024)
    config.init_from = "/checkpoints/wsd"

The files configs/NAME.py are the same stages for the command line, where `parse` reads what follows the colon in
--config=configs/sft.py:smollm2_135m,length=1024. Values that the paper does not publish are named as such there.

Example:
    >>> import llada_jax
    >>> config = llada_jax.stages.sft("smollm2_135m", length=1024)
    >>> config.objective.complementary, config.schedule.block_size
    (True, 32)
"""

import inspect
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from llada_jax.errors import InputError
from llada_jax.training.sections import default_config, is_large, split_over_pod

PACKAGE = str(Path(__file__).resolve().parent.parent)  # the text that small models train on: this package's sources


def ar(model: str = "tiny", length: int = 256, steps: int = 200) -> ConfigDict:
    """A small autoregressive model: block size 1, shifted alignment, every token supervised."""
    config = default_config(model)
    config.stage = "ar"
    config.alignment = "shifted"
    config.schedule.kind = "ar"
    config.schedule.steps = steps
    config.data.length = length
    _train_on_own_sources(config)
    config.evaluation.block_sizes = (1,)
    return config


def wsd(model: str = "tiny", length: int | None = None) -> ConfigDict:
    """Continual pre-training by block size, warm-up, stable, decay (Section 4.1). length: tokens per row, by default
    256 for the tiny models and 4,096 for others.
    """
    config = default_config(model)
    config.stage = "wsd"
    if model.startswith("tiny"):
        _train_on_own_sources(config)
        config.checkpoint.every_steps = 20
    else:
        _conversion(config, 4096 if length is None else length)
    if length:
        config.data.length = length
    return config


def sft(model: str = "init_from", length: int | None = None, steps: int = 1000) -> ConfigDict:
    """Supervised fine-tuning (Eq. 5): noise on the response only, complementary masks, a band of noise rates. length:
    tokens per row, by default 256 for the tiny models and 2,048 for others.
    """
    tiny = model.startswith("tiny")
    config = default_config(model)
    config.stage = "sft"
    config.data.length = (256 if tiny else 2048) if length is None else length
    config.schedule.kind = "constant"
    config.schedule.block_size = 32
    config.schedule.steps = steps
    config.objective.complementary = True
    config.objective.rate_low = 0.3
    config.objective.rate_high = 0.8
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 30
    config.optimizer.decay_steps = steps // 2
    config.evaluation.block_sizes = (32,)
    if not tiny:
        config.batch.rows = 64
        config.execution.dtype = "bfloat16"
        config.execution.attention = "auto"
        config.execution.remat = "full"
        split_over_pod(config)
        config.checkpoint.every_steps = 200
        config.evaluation.every_steps = 200
    return config


def cap(model: str = "init_from", length: int | None = None, steps: int = 1000) -> ConfigDict:
    """Confidence-aware parallel decoding (Eq. 6): `sft` plus lambda times the entropy of correct predictions."""
    config = sft(model, length, steps)
    config.stage = "cap"
    config.objective.confidence_weight = 2.0
    return config


def edit(model: str = "init_from", length: int | None = None, steps: int = 1000) -> ConfigDict:
    """`sft` that also trains token editing (LLaDA2.1): wrong tokens, half of the rows drafted by the model itself."""
    config = sft(model, length, steps)
    config.stage = "edit"
    config.editing.weight = 1.0
    config.editing.replace_high = 0.3
    config.editing.turns = 2
    config.editing.draft_share = 0.5
    config.editing.threshold_low = 0.3
    return config


def dpo(model: str = "init_from", length: int | None = None, steps: int = 1000) -> ConfigDict:
    """Direct preference optimisation on the diffusion ELBO (Eq. 7, 8), at the rate at which the stage before ended."""
    config = sft(model, length, steps)
    config.stage = "dpo"
    config.preference.enabled = True
    config.objective.complementary = False
    config.objective.rate_low = 1e-3
    config.objective.rate_high = 1.0
    config.objective.block_origin = "document"  # both answers to a prompt then have the same blocks
    config.optimizer.learning_rate = None  # where the stage before ended
    config.optimizer.warmup_steps = 0
    return config


def rl(model: str = "init_from", length: int | None = None, steps: int = 200) -> ConfigDict:
    """Reinforcement learning on verifiable rewards: EBPO (LLaDA2.1), or by trajectories. steps: of rollouts."""
    config = sft(model, length, steps)
    config.stage = "rl"
    config.objective = default_config(model).objective  # there is none
    config.rl.enabled = True
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 10  # updates: Adam's first ones are as large as the rate, whatever the gradient
    config.optimizer.decay_steps = 0
    config.optimizer.weight_decay = 0.01
    config.batch.rows = 64
    config.checkpoint.every_steps = 10
    config.evaluation.every_steps = 10
    config.evaluation.block_sizes = (1,)  # of a NELBO, which such a run has not
    config.log_every_steps = 1
    return config


STAGES: dict[str, Callable[..., ConfigDict]] = {stage.__name__: stage for stage in (ar, wsd, sft, cap, edit, dpo, rl)}


def parse(stage: str, argument: str | None = None) -> ConfigDict:
    """The config of a stage for MODEL[,option=INTEGER]..., the ARGUMENT of --config=configs/STAGE.py:ARGUMENT.

    Without an argument it is that of the stage's default model. Raises InputError naming the option that is not an
    integer, or that the stage does not take.
    """
    function = STAGES[stage]
    known = list(inspect.signature(function).parameters)[1:]
    model, options = _parse_argument(argument)
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"config argument: unknown option {unknown[0]!r}; options: {', '.join(known)}")
    return function(*model, **options)


def _parse_argument(argument: str | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """Splits "MODEL[,option=value]..." into ((MODEL,), options), or ((), {}) when there is no argument."""
    if not argument:
        return (), {}
    model, *options = argument.split(",")
    parsed = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not value.lstrip("-").isdigit():
            raise InputError(f"config argument: {option!r}, expected option=INTEGER")
        parsed[name] = int(value)
    return (model,), parsed


def _train_on_own_sources(config: ConfigDict) -> None:
    config.data.source = PACKAGE
    config.data.patterns = ("*.py",)
    config.data.tokenizer = "bytes"
    config.optimizer.learning_rate = 3e-3


def _conversion(config: ConfigDict, length: int) -> None:
    """The paper's curriculum; it publishes neither steps nor learning rates, so these are ours."""
    decay = []
    while length // 2 ** (len(decay) + 1) >= 32:
        decay.append(length // 2 ** (len(decay) + 1))
    config.data.length = length
    config.batch.rows = 256
    config.schedule.warmup_blocks = tuple(b for b in (1, 4, 32, 64) if b < length)
    config.schedule.warmup_steps = (500,) * len(config.schedule.warmup_blocks)
    config.schedule.stable_steps = 20_000
    config.schedule.decay_blocks = tuple(decay)
    config.schedule.decay_steps = (500,) * len(decay)
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 200
    config.optimizer.decay_steps = 500 * len(decay)
    config.objective.embedding_noise_std = 0.02
    config.objective.embedding_noise_steps = 500
    config.execution.dtype = "bfloat16"
    config.execution.attention = "auto"
    config.execution.experts = "auto"
    config.execution.remat = "full"
    if is_large(config.model):
        config.batch.rows = 1024
    split_over_pod(config)
    config.checkpoint.every_steps = 500
    config.evaluation.every_steps = 500
    config.evaluation.block_sizes = (1, 4, 32, length)
