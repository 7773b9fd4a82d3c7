"""LLaDA2.0-flash on v5p:8x8x8: 512 chips, 2 rows of 4,096 tokens each.

    python tools/rehearse.py --config=experiments/pods/flash_v5p.py --topology=v5p:8x8x8

Compiler-estimated: 64.8 of 95 GiB a chip, 2.350 s a step, serial MFU 47.4%, 3,487 clean tokens a
second and chip.

    python experiments/launch/launch.py tpu_vm --name=flash --topology=v5p:8x8x8 --action=watch \
        --project=P --zone=Z --workdir=gs://B/flash --rows=gs://B/ROWS -- \
        --config=experiments/pods/flash_v5p.py --config.init_from=CHECKPOINT
"""

from pathlib import Path

from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPOLOGY, SLICES = "v5p:8x8x8", 1


def get_config(argument=None):
    return load_sibling(str(CONFIGS / "wsd.py"), "wsd").get_config("llada2_flash")
