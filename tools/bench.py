"""Measures or estimates what the parts of a training step cost.

python tools/bench.py attention [--topology=v5p:2x2x1] [--lengths=2048,4096,8192] [--implementations=...] [--json=FILE]
python tools/bench.py attention --device=cpu [--model=tiny] [--lengths=1024]

The first compiles attention ahead of time for a TPU, without one, and prints for 16 fixed rows of packed documents the
tiles executed, the cycles that the compiler's schedules add up to on the busiest core of a device, their share of the
matrix units' peak (counting only pairs that the mask needs), the copies at HBM bandwidth in cycles, and the temporaries
in HBM: compiler-estimated, not measured. Where rows can be held against a bar (bench/bars.py) it says whether they meet
it. --passes=decode costs a batch that decodes a block a row against caches of --lengths. Baselines need the extra:
pip install -e '.[tpu,bench]'.

The second times a training step of block diffusion with dense and with blockwise attention on the device at hand.

python tools/bench.py convert [--layers=6] [--rounds=3] [--directory=DIR]

makes a Hugging Face checkpoint of random weights with the names, shapes and shards of LLaDA2.0-mini (9.5 GB with 6
layers) in DIR, imports and exports it in turn with `cp -r` and fsync of the same files, each from a cold cache, and
prints seconds, rates, and the most memory that a command held; DIR needs room for three copies, and is emptied again.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from absl import flags

from llada_jax import errors
from llada_jax.errors import InputError

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "Slice to compile for, v5e | v5p | v6e | tpu7x.")
_LENGTHS = flags.DEFINE_list("lengths", None, "Tokens of a row. Default: 2048,4096,8192, or 1024 with --device.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "Default: all.")
_PASSES = flags.DEFINE_list("passes", ["forward", "backward", "both"], "forward, backward, both, decode.")
_DEVICE = flags.DEFINE_enum("device", None, ["cpu", "gpu", "tpu"], "Measure a training step on this device instead.")
_MODEL = flags.DEFINE_string("model", "tiny", "Preset of the measured step.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of the measured step.")
_LAYERS = flags.DEFINE_integer("layers", 6, "Layers of the converted checkpoint, at least 2.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Conversions and copies in turn; the fastest counts.", lower_bound=1)
_DIRECTORY = flags.DEFINE_string("directory", ".", "Where the checkpoints to convert are made and removed.")
_JSON = flags.DEFINE_string("json", None, "File for the rows of the table.")


def main(argv) -> None:
    {"attention": _attention, "convert": _convert}[argv[1]]()


def _attention() -> None:
    lengths = _LENGTHS.value or (["1024"] if _DEVICE.value else ["2048", "4096", "8192"])
    if not all(length.isdecimal() and int(length) > 0 for length in lengths):
        raise InputError(f"--lengths={','.join(lengths)}, expected positive integers")
    (_measure if _DEVICE.value else _estimate)(list(map(int, lengths)))


def _write(result: list[dict]) -> None:
    """Writes the rows so far: an interruption loses none of them."""
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result, indent=1) + "\n")


def _estimate(lengths: list[int]) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs on the TPU that programs are compiled for
    from llada_jax.bench import attention, bars, rows  # after the flags are parsed: jax takes seconds
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
            for mean, direction, cost in attention.costs(name, length, rows.MEANS, _PASSES.value, topology.name):
                print(
                    f"{length:6} {f'mean {mean}' if mean else 'one':9} {name:15} {direction:8} {cost.tiles['full']:11} "
                    f"{cost.tiles['partial']:8} {cost.cycles / 1e6:8.1f} {cost.peak_share:5.1%} "
                    f"{cost.dma_cycles / 1e6:7.1f} {cost.temp_bytes / 2**30:6.3f}",
                    flush=True,
                )
                where = {"implementation": name, "length": length, "mean_document": mean, "pass": direction}
                result.append(where | dataclasses.asdict(cost) | {"topology": topology.name})
                _write(result)
    for bar in bars.bars(result):
        print(bar)


def _measure(lengths: list[int]) -> None:
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
        _write(result)


def _convert() -> None:
    from llada_jax.bench import convert
    from llada_jax.model.config import preset

    folder = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=_DIRECTORY.value))
    try:
        source, copied, ours, exported = (folder / name for name in ("source", "copied", "ours", "exported"))
        size = convert.write_source(source, preset("llada2_mini").replace(num_layers=_LAYERS.value))
        base = convert.interpreter().peak_bytes
        print(f"{size / 1e9:.2f} GB, imports alone hold {base / 2**20:.0f} MiB; load average {os.getloadavg()[0]:.1f}")
        print("round command seconds  MB/s  CPU seconds  MiB above the imports")
        result = []
        for number in range(_ROUNDS.value):
            runs = {"cp": convert.copy(source, copied), "import": convert.import_folder(source, ours)}
            shutil.rmtree(copied)
            runs["export"] = convert.export_folder(ours, exported)
            for name, run in runs.items():
                above = max(0, run.peak_bytes - base)
                print(f"{number:5} {name:7} {run.seconds:7.1f} {size / run.seconds / 1e6:5.0f} {run.cpu_seconds:12.1f} "
                      f"{above / 2**20:22.0f}", flush=True)  # fmt: skip
                result.append({"command": name, "bytes": size, "bytes_above_imports": above} | dataclasses.asdict(run))
            _write(result)
            if differing := convert.differences(source, exported):
                raise AssertionError(f"{differing[0]} and {len(differing) - 1} more tensors have changed")
            shutil.rmtree(ours)
            shutil.rmtree(exported)
        least = {name: min(row["seconds"] for row in result if row["command"] == name) for name in runs}
        for name in ("import", "export"):
            print(f"{name}: {least['cp'] / least[name]:.0%} of the rate of cp (fastest of {_ROUNDS.value} each)")
        print(f"every tensor came back byte for byte; load average {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    errors.run(main, commands=("attention", "convert"))
