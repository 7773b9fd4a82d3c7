"""Measures or estimates what the parts of a training step, and decoding, cost.

python tools/bench.py attention [--topology=v5p:2x2x1] [--lengths=2048,4096,8192] [--implementations=...] [--json=FILE]
python tools/bench.py attention --device=cpu [--model=tiny] [--lengths=1024]

The first compiles attention ahead of time for a TPU, without one, and prints for 16 fixed rows of packed documents the
tiles executed, the cycles that the compiler's schedules add up to on the busiest core of a device, their share of the
matrix units' peak (counting only pairs that the mask needs), the copies at HBM bandwidth in cycles, and the temporaries
in HBM: compiler-estimated, not measured. Baselines need the extra: pip install -e '.[tpu,bench]'.

The second times a training step of block diffusion with dense and with blockwise attention on the device at hand.

python tools/bench.py decode [--model=tiny_moe] [--batches=1,4,16,64] [--parts=recompute,prefix,commit,batches,...]

Times decoding on the device at hand, with random weights: 512 tokens, one per forward, with the cache and with the
prefix computed again at every step (recompute); a step after a prefix of 512 tokens against one after none (prefix); a
pass over windows of one and of two blocks (commit); throughput and positions evaluated per token against batch
(batches); 200 ragged requests, batched continuously (continuous); and the cost model, with the experts that a batch
reaches: bytes, FLOPs and roofline time of a pass of --cost_model, and where it becomes compute-bound (cost).
"""

import dataclasses
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
_MODEL = flags.DEFINE_string("model", None, "Preset that is measured. Default: tiny; decode: tiny_moe.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of the measured step.")
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "decode: rows of a batch.")
_PARTS = flags.DEFINE_list("parts", None, "decode: recompute, prefix, commit, batches, continuous, cost. Default: all.")
_COST_MODEL = flags.DEFINE_string("cost_model", "llada2_mini", "decode: preset of the cost model.")
_CHIP = flags.DEFINE_string("chip", "v5p", "decode: chip of the cost model, v5e | v5p | v6e | tpu7x.")
_JSON = flags.DEFINE_string("json", None, "File for the rows of the table.")


def main(argv) -> None:
    result = {"attention": _attention, "decode": _decode}[argv[1]]()
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result, indent=1) + "\n")


def _attention() -> list[dict]:
    lengths = _LENGTHS.value or (["1024"] if _DEVICE.value else ["2048", "4096", "8192"])
    if not all(length.isdecimal() and int(length) > 0 for length in lengths):
        raise InputError(f"--lengths={','.join(lengths)}, expected positive integers")
    return _measure(map(int, lengths)) if _DEVICE.value else _estimate(list(map(int, lengths)))


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
    name = _MODEL.value or "tiny"
    model = preset(name)
    print(f"{jax.devices()[0].device_kind}, {name}, {_ROWS.value} row(s) of one document, block size 32: a step")
    print(f"length implementation  seconds (least of {REPEATS})  temporaries MiB  loss")
    result = []
    for length in lengths:
        measured = measure(model, names, np.ones((_ROWS.value, length), np.int32), block_size=32)
        for name, row in measured.items():
            print(f"{length:6} {name:14} {row.seconds:10.3f} {row.temp_bytes / 2**20:24.1f} {row.loss:11.4f}")
            result.append({"implementation": name, "length": length} | dataclasses.asdict(row))
    return result


def _decode() -> dict:
    from llada_jax.bench.decode_report import PARTS, report
    from llada_jax.model.config import preset
    from llada_jax.pod.chips import CHIPS

    parts = _PARTS.value or list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--parts={part}, expected some of {', '.join(PARTS)}")
    if not all(rows.isdecimal() and int(rows) > 0 for rows in _BATCHES.value):
        raise InputError(f"--batches={','.join(_BATCHES.value)}, expected positive integers")
    if _CHIP.value not in CHIPS:
        raise InputError(f"--chip={_CHIP.value}, expected one of {', '.join(CHIPS)}")
    model = _MODEL.value or "tiny_moe"
    return report(model, parts, [int(rows) for rows in _BATCHES.value], preset(_COST_MODEL.value), CHIPS[_CHIP.value])


if __name__ == "__main__":
    errors.run(main, commands=("attention", "decode"))
