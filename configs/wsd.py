"""Warmup-Stable-Decay continual pre-training: from an AR checkpoint to a block-diffusion model (Section 4.1).

    python -m llada_jax.train --config=configs/wsd.py:tiny --workdir=/tmp/tiny

trains a 0.9 M parameter model from random weights on this repository's own sources, one token per byte, through the
whole curriculum (block size 1 -> 4 -> 32 -> 64 -> 256 -> 128 -> 64 -> 32) in about two and a half minutes on two CPU
cores. Held-out NELBO at the end, nats per byte: 2.85 at block size 1, 2.87 at 32, 2.88 at 256 (5.5 is chance).

Options: length (tokens per row). A real conversion starts from an imported checkpoint:

    python -m llada_jax.train --config=configs/wsd.py:init_from --workdir=DIR --config.init_from=CHECKPOINT \
        --config.data.path=PACKED_ROWS

"init_from" instead of a preset is the model that CHECKPOINT holds, of whatever size.

The mixtures of experts are for pods, with the mesh of split_over_pod; experiments/pods/ has a config for each slice,
with what was rehearsed. Before a pod is rented (compiler-estimated):

    python tools/rehearse.py --config=configs/wsd.py:llada2_mini --topology=v5p:4x4x4

fits 64 chips with 4 rows per chip: 33 of 95 GiB, serial MFU 47%, 19.5 thousand clean tokens per second and chip;

    python tools/rehearse.py --config=configs/wsd.py:llada2_flash --topology=v5p:8x8x8

fits 512 chips with 2 rows per chip: 65 of 95 GiB, 47%, 3.5 thousand.
"""

from llada_jax.training import stages


def get_config(argument=None):
    return stages.parse("wsd", argument)
