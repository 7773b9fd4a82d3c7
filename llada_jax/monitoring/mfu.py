"""MFU and memory of a run's devices; MFU only for chips whose peak is known."""

from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from llada_jax.chips import CHIPS
from llada_jax.diffusion.objectives import one_document
from llada_jax.diffusion.schedule import Phase
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.model.useful_flops import mean_pairs, useful_flops


class Speed:
    """MFU of steps: useful FLOPs (model/useful_flops.py) per second over the bfloat16 peak of all devices.

    The documents of the held-out rows stand for those of the batches. There is no MFU for devices without a known peak
    (CPU, GPU), nor for DPO, reinforcement learning and LoRA, whose passes differ.
    """

    def __init__(
        self, config: ConfigDict, phases: Sequence[Phase], model: ModelConfig | Lora, documents: np.ndarray | None,
        devices: Sequence[jax.Device],
    ):  # fmt: skip
        """documents: segment ids of the held-out rows, int [rows, length]; None where there is no MFU."""
        differs = config.preference.enabled or config.rl.enabled or config.lora.rank
        self._peak = None if differs else peak_flops(devices)
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        rows = config.batch.rows
        self._flops = {}
        if self._peak and not config.objective.document_mask:
            documents = np.asarray(one_document(documents))
        for phase in phases if self._peak else ():
            twice = 2 if config.objective.complementary and phase.halves != "clean" else 1
            pairs = mean_pairs(documents, phase.block_size, phase.halves, config.objective.block_origin)
            self._flops[phase] = useful_flops(model, twice * rows, config.data.length, phase.halves, pairs)

    def fields(self, phase: Phase, seconds_per_step: float) -> dict[str, float]:
        """Fields of a metrics row, if known: "mfu", and "hbm_bytes" and "hbm_peak_bytes" of this process's fullest
        device.
        """
        fields = {}
        if self._peak and seconds_per_step:
            fields["mfu"] = self._flops[phase] / (seconds_per_step * self._peak)
        memory = [stats for device in self._local if (stats := device.memory_stats())]
        for name, key in (("hbm_bytes", "bytes_in_use"), ("hbm_peak_bytes", "peak_bytes_in_use")):
            if memory and all(key in stats for stats in memory):
                fields[name] = max(stats[key] for stats in memory)
        return fields


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Peak bfloat16 FLOP/s of all devices together; None unless all are known TPU chips."""
    chips = {chip.device_kind: chip for chip in CHIPS.values()}
    if any(device.device_kind not in chips for device in devices):
        return None
    return sum(chips[device.device_kind].peak_bf16 / chips[device.device_kind].devices for device in devices)
