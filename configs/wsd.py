"""Warmup-Stable-Decay continual pre-training: from an AR checkpoint to a block-diffusion model (Section 4.1).

    python -m llada_jax.train --config=configs/wsd.py:tiny --workdir=/tmp/tiny

trains a 0.9 M parameter model from random weights on this repository's own sources, one token a byte, through the
whole curriculum (block size 1 -> 4 -> 32 -> 64 -> 256 -> 128 -> 64 -> 32) in about two and a half minutes on two CPU
cores. Held-out NELBO at the end, nats per byte: 2.85 at block size 1, 2.87 at 32, 2.88 at 256 (5.5 is chance).

Options: length (tokens a row). A real conversion starts from an imported checkpoint:

    python -m llada_jax.train --config=configs/wsd.py:init_from --workdir=DIR --config.init_from=CHECKPOINT \
        --config.data.path=PACKED_ROWS

"init_from" instead of a preset is the model that CHECKPOINT holds, of whatever size.

The mixtures of experts are for pods, with the mesh of split_over_pod; experiments/pods/ has a config for each slice,
with what was rehearsed. Before a pod is rented (compiler-estimated):

    python tools/rehearse.py --config=configs/wsd.py:llada2_mini --topology=v5p:4x4x4

fits 64 chips with 4 rows a chip: 33 of 95 GiB, serial MFU 47%, 19.5 thousand clean tokens a second and chip;

    python tools/rehearse.py --config=configs/wsd.py:llada2_flash --topology=v5p:8x8x8

fits 512 chips with 2 rows a chip: 65 of 95 GiB, 47%, 3.5 thousand.
"""

from pathlib import Path

from llada_jax.training.config import default_config, is_large, parse_argument, refuse_unknown, split_over_pod

PACKAGE = str(Path(__file__).resolve().parent.parent / "llada_jax")


def get_config(argument=None):
    model, options = parse_argument(argument)
    refuse_unknown(options, ["length"])
    config = default_config(model)
    config.stage = "wsd"
    if model.startswith("tiny"):
        _tiny(config)
    else:
        _conversion(config, options.get("length", 4096))
    if length := options.get("length"):
        config.data.length = length
    return config


def _tiny(config):
    config.data.source = PACKAGE
    config.data.patterns = ("*.py",)
    config.data.tokenizer = "bytes"
    config.optimizer.learning_rate = 3e-3
    config.checkpoint.every_steps = 20


def _conversion(config, length: int):
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
