"""Launches of LLaDA2.0-mini and -flash on TPU slices, rows of 4,096 tokens: one table, a launch is MODEL_CHIP.

Rehearsals, and what the compiler estimates (results/NAME.json):

    python tools/rehearse.py --config=experiments/pods/config.py:mini_v5p --topology=v5p:4x4x4
        32.8 of 95 GiB per chip, 0.834 s per step, serial MFU 47.4%, 19,649 clean tokens per second and chip
    python tools/rehearse.py --config=experiments/pods/config.py:mini_v6e --topology=v6e:8x8
        25.2 of 32 GiB per chip, 1.823 s per step, serial MFU 21.7%, 17,979 clean tokens per second and chip
    python tools/rehearse.py --config=experiments/pods/config.py:mini_v5e --topology=v5e:16x16
        8.1 of 16 GiB per chip, 1.253 s per step, serial MFU 18.4%, 3,269 clean tokens per second and chip
    python tools/rehearse.py --config=experiments/pods/config.py:mini_tpu7x --topology=tpu7x:2x4x4
        153.7 of 192 GiB per chip, 1.412 s per step, serial MFU 22.3%, 46,402 clean tokens per second and chip
    python tools/rehearse.py --config=experiments/pods/config.py:flash_v5p --topology=v5p:8x8x8
        64.8 of 95 GiB per chip, 2.423 s per step, serial MFU 45.9%, 3,381 clean tokens per second and chip
    python tools/rehearse.py --config=experiments/pods/config.py:flash_v6e --topology=v6e:16x16 --slices=2
        23.9 of 32 GiB per chip, 2.617 s per step, serial MFU 10.6%, 1,565 clean tokens per second and chip
    python tools/rehearse.py --config=experiments/pods/config.py:flash_tpu7x --topology=tpu7x:4x4x8
        151.7 of 192 GiB per chip, 3.005 s per step, serial MFU 14.7%, 5,452 clean tokens per second and chip

Launches, TPU VMs and GKE:

    python experiments/launch/launch.py tpu_vm --name=mini --topology=v5p:4x4x4 --action=watch \
        --project=P --zone=Z --workdir=gs://B/mini --rows=gs://B/ROWS -- \
        --config=experiments/pods/config.py:mini_v5p --config.init_from=CHECKPOINT

    python experiments/launch/launch.py xpk --cluster=C --name=flash --topology=tpu7x:4x4x8 \
        --project=P --zone=Z --workdir=gs://B/flash --rows=gs://B/ROWS -- \
        --config=experiments/pods/config.py:flash_tpu7x --config.init_from=CHECKPOINT
"""

import dataclasses
from collections.abc import Mapping

from llada_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Launch:
    """preset: of llada_jax.model.config. slices: how many of `topology`, joined by the data-centre network.
    fields: {field of the config: value} that differ from configs/wsd.py:PRESET.
    """

    preset: str
    topology: str
    slices: int = 1
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)


LAUNCHES = {
    "mini_v5p": Launch("llada2_mini", "v5p:4x4x4"),
    "mini_v6e": Launch("llada2_mini", "v6e:8x8", fields={"batch.rows": 512, "execution.remat": "offload_input"}),
    "mini_v5e": Launch("llada2_mini", "v5e:16x16", fields={"batch.rows": 256, "execution.remat": "attention"}),
    # The two devices of a chip hold copies: with weights split over both too, mini sent 1.7 times the bytes.
    "mini_tpu7x": Launch("llada2_mini", "tpu7x:2x4x4", fields={"batch.rows": 512, "mesh.data": 2, "mesh.fsdp": 32}),
    "flash_v5p": Launch("llada2_flash", "v5p:8x8x8"),
    # A layer's experts and their gradients would take 13 GB of a chip: pairs of chips share them, and tokens move.
    "flash_v6e": Launch(
        "llada2_flash", "v6e:16x16", slices=2,
        fields={
            "batch.rows": 512, "mesh.data": 2, "mesh.fsdp": 128, "mesh.expert": 2,
            "execution.expert_parallel": "gather_tokens", "execution.remat": "attention",
        },
    ),
    "flash_tpu7x": Launch("llada2_flash", "tpu7x:4x4x8", fields={"batch.rows": 512, "mesh.data": 2, "mesh.fsdp": 128}),
}  # fmt: skip


def get_config(name: str = ""):
    """The training config of a launch. Raises InputError on a name that is not in LAUNCHES."""
    if name not in LAUNCHES:
        raise InputError(f"config argument: {name!r}, expected one of {', '.join(LAUNCHES)}")
    from llada_jax.training import stages  # importing jax takes seconds: not for the names alone

    launch = LAUNCHES[name]
    config = stages.wsd(launch.preset)
    config.update_from_flattened_dict(dict(launch.fields))
    return config
