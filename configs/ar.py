"""Trains a small AR model of our own by the same loop: block size 1, shifted alignment, every token supervised.

    python -m llada_jax.train --config=configs/ar.py:tiny --workdir=/tmp/ar

trains 0.9 M parameters on this repository's own sources, one token a byte, in about a minute on two CPU cores.
Options: length, steps. The result is a start for configs/wsd.py: --config.init_from=/tmp/ar
"""

from pathlib import Path

from llada_jax.training.config import default_config, parse_argument, refuse_unknown

PACKAGE = str(Path(__file__).resolve().parent.parent / "llada_jax")


def get_config(argument=None):
    model, options = parse_argument(argument)
    refuse_unknown(options, ["length", "steps"])
    config = default_config(model)
    config.stage = "ar"
    config.alignment = "shifted"
    config.schedule.kind = "ar"
    config.schedule.steps = options.get("steps", 200)
    config.data.length = options.get("length", 256)
    config.data.source = PACKAGE
    config.data.patterns = ("*.py",)
    config.data.tokenizer = "bytes"
    config.optimizer.learning_rate = 3e-3
    config.evaluation.block_sizes = (1,)
    return config
