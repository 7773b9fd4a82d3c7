"""Confidence-aware parallel decoding (Eq. 6): SFT plus lambda times the entropy of correctly predicted tokens.

    python -m llada_jax.train --config=configs/cap.py --workdir=DIR --config.init_from=SFT_WORKDIR \
        --config.data.path=ROWS

Sharper correct predictions pass the decoding threshold sooner: more tokens per forward. The paper does not give
lambda; 2.0 at temperature 1 is what the authors' released trainer recommends. Options: length, steps (as in
configs/sft.py).
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("cap", argument)
