"""LLaDA2.0-flash on tpu7x:4x4x8: 128 chips of two devices, 2 rows of 4,096 tokens a device.

    python tools/rehearse.py --config=experiments/pods/flash_tpu7x.py --topology=tpu7x:4x4x8

Compiler-estimated: 151.7 of 192 GiB a chip, 3.005 s a step, serial MFU 14.7%, 5,452 clean tokens a
second and chip.

    python experiments/launch/launch.py xpk --cluster=C --name=flash --topology=tpu7x:4x4x8 \
        --project=P --zone=Z --workdir=gs://B/flash --rows=gs://B/ROWS -- \
        --config=experiments/pods/flash_tpu7x.py --config.init_from=CHECKPOINT
"""

from pathlib import Path

from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPOLOGY, SLICES = "tpu7x:4x4x8", 1


def get_config(argument=None):
    config = load_sibling(str(CONFIGS / "wsd.py"), "wsd").get_config("llada2_flash")
    config.batch.rows = 512
    # The two devices of a chip hold copies: weights split over both too, mini sent 1.7 times the bytes.
    config.mesh.data, config.mesh.fsdp = 2, 128
    return config
