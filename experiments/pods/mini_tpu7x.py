"""LLaDA2.0-mini on tpu7x:2x4x4: 32 chips of two devices, 8 rows of 4,096 tokens a device.

    python tools/rehearse.py --config=experiments/pods/mini_tpu7x.py --topology=tpu7x:2x4x4

Compiler-estimated: 153.7 of 192 GiB a chip, 1.412 s a step, serial MFU 22.3%, 46,402 clean tokens a
second and chip.

    python experiments/launch/launch.py xpk --cluster=C --name=mini --topology=tpu7x:2x4x4 \
        --project=P --zone=Z --workdir=gs://B/mini --rows=gs://B/ROWS -- \
        --config=experiments/pods/mini_tpu7x.py --config.init_from=CHECKPOINT
"""

from pathlib import Path

from llada_jax.training.config import load_sibling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPOLOGY, SLICES = "tpu7x:2x4x4", 1


def get_config(argument=None):
    config = load_sibling(str(CONFIGS / "wsd.py"), "wsd").get_config("llada2_mini")
    config.batch.rows = 512
    # The two devices of a chip hold copies: weights split over both too, mini sent 1.7 times the bytes.
    config.mesh.data, config.mesh.fsdp = 2, 32
    return config
