"""Seconds per step of what MaxText compiled (compile.py) and of our step, by the estimator of tools/rehearse.py.

    python experiments/maxtext/estimate.py OUT.hlo [OURS.json ...]          # of tools/rehearse.py --json

Attention is left out, as the two steps have different masks. MaxText's grouped matmuls count at the peak of the matrix
units, as if no tile were wasted; ours count by their schedules.
"""

import json
import sys
from pathlib import Path

import jax

from llada_jax.chips import parse_topology
from llada_jax.pod import hlo
from llada_jax.pod.lower import Slices
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.rehearse import physical_devices
from llada_jax.pod.step_cost import PARTS, step_lines
from llada_jax.pod.topology import slice_devices

TOPOLOGY = parse_topology("v5p:4x4x4")
AT_PEAK = TOPOLOGY.chip.peak_bf16 / TOPOLOGY.chip.devices
OTHERS = [part for part in PARTS if part != "attention"]


def grouped_matmul(result, operands):
    """(part, Cost) of megablox: rows x in x out multiply-accumulates, from the shapes of what it takes and gives."""
    arrays = [array.shape for array in (*operands, *result) if array.dtype == "bf16"]
    rows = max(max(shape) for shape in arrays if len(shape) == 2)
    (_, contracted, columns), *_ = (shape for shape in arrays if len(shape) == 3)
    flops = 2.0 * rows * contracted * columns
    return "experts", OperationCost(flops / AT_PEAK, flops)


def seconds_of(text: str) -> dict[str, float]:
    mesh = jax.sharding.Mesh(slice_devices(TOPOLOGY).reshape(-1), ("fsdp",))
    attention = {"splash": lambda result, operands: ("attention", OperationCost(0.0, 0.0))}
    kernels = attention | dict.fromkeys(("gmm", "tgmm"), grouped_matmul)
    lines = step_lines(hlo.parse(text), TOPOLOGY.chip, kernels, physical_devices(mesh, Slices(TOPOLOGY)))
    return {part: sum(line.seconds for line in lines if line.part == part) for part in OTHERS}


def main(theirs: Path, *ours: str) -> None:
    memory = json.loads(theirs.with_suffix(theirs.suffix + ".json").read_text())["bytes"]
    rows = {"MaxText": (seconds_of(theirs.read_text()), memory)}
    for name in ours:
        rehearsed = json.loads(Path(name).read_text())
        rows[Path(name).stem] = {part: rehearsed["seconds"][part] for part in OTHERS}, rehearsed["hbm_bytes"]
    print(f"{'seconds of':12}", *(f"{part:>11}" for part in OTHERS), " all but attention   of MaxText's   GiB a chip")
    whole = sum(rows["MaxText"][0].values())
    for name, (seconds, memory) in rows.items():
        total = sum(seconds.values())
        print(
            f"{name:12}", *(f"{value:11.3f}" for value in seconds.values()),
            f"{total:18.3f} {total / whole:15.2f} {memory / 2**30:12.1f}",
        )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(Path(sys.argv[1]), *sys.argv[2:])
