"""Confidence-aware parallel decoding (Eq. 6): SFT plus lambda times the entropy of correctly predicted tokens.

    python -m llada_jax.train --config=configs/cap.py:MODEL --workdir=DIR --config.init_from=SFT_WORKDIR \
        --config.data.path=ROWS

Sharper correct predictions pass the decoding threshold sooner: more tokens per forward. The paper does not give
lambda; 2.0 at temperature 1 is what the authors' released trainer recommends. Options: length, steps (as in
configs/sft.py).
"""

import importlib.util
from pathlib import Path


def get_config(argument=None):
    config = _sibling("sft").get_config(argument)
    config.objective.confidence_weight = 2.0
    return config


def _sibling(name):
    """A config beside this one: configs/ is a folder of programs, not a package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
