"""LLaDA2.0-flash on 2 x v6e:16x16: 512 chips in two slices, 1 row of 4,096 tokens each.

    python tools/rehearse.py --config=experiments/pods/flash_v6e.py --topology=v6e:16x16 --slices=2

Compiler-estimated: 23.9 of 32 GiB a chip, 2.617 s a step, serial MFU 10.6%, 1,565 clean tokens a
second and chip.

    python experiments/launch/launch.py tpu_vm --name=flash --topology=v6e:16x16 --slices=2 --action=watch \
        --project=P --zone=Z --workdir=gs://B/flash --rows=gs://B/ROWS -- \
        --config=experiments/pods/flash_v6e.py --config.init_from=CHECKPOINT
"""

from pathlib import Path

from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPOLOGY, SLICES = "v6e:16x16", 2


def get_config(argument=None):
    config = load_sibling(str(CONFIGS / "wsd.py"), "wsd").get_config("llada2_flash")
    config.batch.rows = 512
    # A whole layer of experts, and its gradients, would take 13 GB of a chip: pairs of chips share it, and tokens move.
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = SLICES, 128, 2
    config.execution.expert_parallel = "gather_tokens"
    config.execution.remat = "attention"
    return config
