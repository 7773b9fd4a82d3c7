"""Trains a small AR model of our own by the same loop: block size 1, shifted alignment, every token supervised.

    python -m llada_jax.train --config=configs/ar.py:tiny --workdir=/tmp/ar

trains 0.9 M parameters on this repository's own sources, one token per byte, in about a minute on two CPU cores.
Options: length, steps. The result is a start for configs/wsd.py: --config.init_from=/tmp/ar
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("ar", argument)
