"""LLaDA2.0-mini on v6e:8x8: 64 chips, 4 rows of 4,096 tokens each.

    python tools/rehearse.py --config=experiments/pods/mini_v6e.py --topology=v6e:8x8

Compiler-estimated: 28.4 of 32 GiB a chip, 1.045 s a step, serial MFU 18.9%, 15,673 clean tokens a
second and chip.

    python experiments/launch/launch.py tpu_vm --name=mini --topology=v6e:8x8 --action=watch \
        --project=P --zone=Z --workdir=gs://B/mini --rows=gs://B/ROWS -- \
        --config=experiments/pods/mini_v6e.py --config.init_from=CHECKPOINT
"""

from pathlib import Path

from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPOLOGY, SLICES = "v6e:8x8", 1


def get_config(argument=None):
    config = load_sibling(str(CONFIGS / "wsd.py"), "wsd").get_config("llada2_mini")
    config.execution.remat = "projections"
    return config
