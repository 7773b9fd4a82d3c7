"""Trains a model by the stages of LLaDA2.0.

python -m llada_jax.train --config=configs/wsd.py:MODEL --workdir=DIR [--config.FIELD=VALUE ...]

MODEL is a preset (tiny, tiny_moe, smollm2_135m, llada2_mini, ...); the config file says which options it takes.
A second run over the same DIR resumes from its newest checkpoint.
"""

from absl import flags
from ml_collections import config_flags

from llada_jax import errors
from llada_jax.config_flag import resolved

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, FILE.py:MODEL[,option=N].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints and metrics; made if it does not exist.")


def main(argv) -> None:
    del argv
    if _CONFIG.value is None or not _WORKDIR.value:
        raise errors.InputError("--config=FILE.py:MODEL and --workdir=DIR are required; see --help")
    from llada_jax.training.loop import train  # importing jax takes seconds: not before the flags are right

    train(resolved(_CONFIG), _WORKDIR.value)


if __name__ == "__main__":
    errors.run(main)
