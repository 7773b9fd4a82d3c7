"""LLaDA2.0-mini on v5p:4x4x4: 64 chips, 4 rows of 4,096 tokens each.

    python tools/rehearse.py --config=experiments/pods/mini_v5p.py --topology=v5p:4x4x4

Compiler-estimated: 32.8 of 95 GiB a chip, 0.839 s a step, serial MFU 47.2%, 19,537 clean tokens a
second and chip.

    python experiments/launch/launch.py tpu_vm --name=mini --topology=v5p:4x4x4 --action=watch \
        --project=P --zone=Z --workdir=gs://B/mini --rows=gs://B/ROWS -- \
        --config=experiments/pods/mini_v5p.py --config.init_from=CHECKPOINT
"""

from pathlib import Path

from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPOLOGY, SLICES = "v5p:4x4x4", 1


def get_config(argument=None):
    return load_sibling(str(CONFIGS / "wsd.py"), "wsd").get_config("llada2_mini")
