"""Measures or estimates what the parts of a training step cost.

python tools/bench.py attention [--topology=v5p:2x2x1] [--lengths=2048,4096,8192] [--implementations=...] [--json=FILE]
python tools/bench.py attention --device=cpu [--model=tiny] [--lengths=1024]
python tools/bench.py experts [--topology=v5p:2x2x1] [--models=llada2_mini,llada2_flash] [--implementations=...]

The first compiles attention ahead of time for a TPU, without one, and prints for 16 fixed rows of packed documents the
tiles executed, the cycles that the compiler's schedules add up to on the busiest core of a device, their share of the
matrix units' peak (counting only pairs that the mask needs), the copies at HBM bandwidth in cycles, and the temporaries
in HBM: compiler-estimated, not measured. Baselines need the extra: pip install -e '.[tpu,bench]'.

The last does so for the grouped matmuls of a layer's experts, megablox beside tokamax.

The second times a training step of block diffusion with dense and with blockwise attention on the device at hand.
"""

import dataclasses
import itertools
import json
from pathlib import Path

from absl import flags

from llada_jax import errors
from llada_jax.errors import InputError

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "Slice to compile for, v5e | v5p | v6e | tpu7x.")
_LENGTHS = flags.DEFINE_list("lengths", None, "Tokens of a row. Default: 2048,4096,8192, or 1024 with --device.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "Default: all.")
_PASSES = flags.DEFINE_list("passes", ["forward", "backward", "both"], "forward, backward, both.")
_DEVICE = flags.DEFINE_enum("device", None, ["cpu", "gpu", "tpu"], "Measure a training step on this device instead.")
_MODEL = flags.DEFINE_string("model", "tiny", "Preset of the measured step.")
_MODELS = flags.DEFINE_list("models", ["llada2_mini", "llada2_flash"], "Presets whose experts are costed.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of the measured step.")
_JSON = flags.DEFINE_string("json", None, "File for the rows of the table.")


def main(argv) -> None:
    {"attention": _attention, "experts": _experts}[argv[1]]()


def _experts() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs on the TPU that programs are compiled for
    from llada_jax.bench import experts
    from llada_jax.model.config import preset
    from llada_jax.pod.chips import parse_topology

    names = _IMPLEMENTATIONS.value or experts.IMPLEMENTATIONS
    experts.check_implementations(names)
    topology = parse_topology(_TOPOLOGY.value)
    chip, result = topology.chip, []
    print(f"{topology.name}: one device of {chip.cores_per_device} TensorCores at {chip.clock / 1e9:.2f} GHz")
    print(f"{experts.TOKENS} positions, compiler-estimated: Mcycles of the busiest core, share of matrix-unit peak")
    print("model         matmul  pass    implementation  tile             Mcycles  peak  copies")
    for model in _MODELS.value:
        for name in names:
            for matmul, direction in itertools.product(experts.matmuls(preset(model)), experts.PASSES):
                cost = experts.cost(name, model, matmul, direction, topology.name)
                tile = "x".join(map(str, cost.tile))
                print(
                    f"{model:13} {matmul:7} {direction:7} {name:15} {tile:16} {cost.cycles / 1e6:7.2f} "
                    f"{cost.peak_share:5.1%} {cost.dma_cycles / 1e6:7.2f}",
                    flush=True,
                )
                where = {"implementation": name, "model": model, "matmul": matmul, "pass": direction}
                result.append(where | dataclasses.asdict(cost) | {"topology": topology.name})
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result, indent=1) + "\n")


def _attention() -> None:
    lengths = _LENGTHS.value or (["1024"] if _DEVICE.value else ["2048", "4096", "8192"])
    if not all(length.isdecimal() and int(length) > 0 for length in lengths):
        raise InputError(f"--lengths={','.join(lengths)}, expected positive integers")
    result = _measure(map(int, lengths)) if _DEVICE.value else _estimate(list(map(int, lengths)))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result, indent=1) + "\n")


def _estimate(lengths: list[int]) -> list[dict]:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs on the TPU that programs are compiled for
    from llada_jax.bench import attention, rows  # after the flags are parsed: jax takes seconds
    from llada_jax.pod.chips import parse_topology

    implementations = _IMPLEMENTATIONS.value or attention.IMPLEMENTATIONS
    attention.check_implementations(implementations)
    topology = parse_topology(_TOPOLOGY.value)
    for length in lengths:
        if length not in rows.LENGTHS:
            raise InputError(f"--lengths={length}, expected some of {', '.join(map(str, rows.LENGTHS))}")
    for name in _PASSES.value:
        if name not in attention.PASSES:
            raise InputError(f"--passes={name}, expected some of {', '.join(attention.PASSES)}")
    chip = topology.chip
    print(f"{topology.name}: one device of {chip.cores_per_device} TensorCores at {chip.clock / 1e9:.2f} GHz")
    print("16 rows, compiler-estimated: Mcycles of the busiest core, share of matrix-unit peak, Mcycles of copies")
    print("length documents implementation  pass      full tiles  partial  Mcycles  peak  copies temp GiB")
    result = []
    for length in lengths:
        for name in implementations:
            costs = attention.costs(name, length, rows.MEANS, _PASSES.value, topology.name)
            for (mean, direction), cost in costs.items():
                print(
                    f"{length:6} {f'mean {mean}' if mean else 'one':9} {name:15} {direction:8} {cost.tiles['full']:11} "
                    f"{cost.tiles['partial']:8} {cost.cycles / 1e6:8.1f} {cost.peak_share:5.1%} "
                    f"{cost.dma_cycles / 1e6:7.1f} {cost.temp_bytes / 2**30:6.3f}",
                    flush=True,
                )
                where = {"implementation": name, "length": length, "mean_document": mean, "pass": direction}
                result.append(where | dataclasses.asdict(cost) | {"topology": topology.name})
    return result


def _measure(lengths) -> list[dict]:
    import jax

    jax.config.update("jax_platforms", _DEVICE.value)
    import numpy as np

    from llada_jax.bench.step import REPEATS, measure
    from llada_jax.model.config import preset

    names = _IMPLEMENTATIONS.value or ["dense", "blockwise"]
    model = preset(_MODEL.value)
    print(
        f"{jax.devices()[0].device_kind}, {_MODEL.value}, {_ROWS.value} row(s) of one document, block size 32: a step"
    )
    print(f"length implementation  seconds (least of {REPEATS})  temporaries MiB  loss")
    result = []
    for length in lengths:
        measured = measure(model, names, np.ones((_ROWS.value, length), np.int32), block_size=32)
        for name, row in measured.items():
            print(f"{length:6} {name:14} {row.seconds:10.3f} {row.temp_bytes / 2**20:24.1f} {row.loss:11.4f}")
            result.append({"implementation": name, "length": length} | dataclasses.asdict(row))
    return result


if __name__ == "__main__":
    errors.run(main, commands=("attention", "experts"))
