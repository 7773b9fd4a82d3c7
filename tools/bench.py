"""Measures or estimates what the parts of a training step, and decoding, cost.

python tools/bench.py COMMAND [--json=FILE] [...]
"""

import json
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.command_line import Command
from llada_jax.errors import InputError

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "Slice to compile for, v4 | v5e | v5p | v6e | tpu7x.")
_LENGTHS = flags.DEFINE_list(
    "lengths", None, "Tokens of a row. Default: attention 2048,4096,8192, with --device 1024; train 256."
)
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "Default: all.")
_PASSES = flags.DEFINE_list("passes", ["forward", "backward", "both"], "forward, backward, both, decode.")
_DEVICE = flags.DEFINE_enum("device", None, ["cpu", "gpu", "tpu"], "Measure a training step on this device.")
_MODEL = flags.DEFINE_string(
    "model", None, "Preset that is measured. Default: attention tiny, decode tiny_moe, train 4.3 M parameters."
)
_MODELS = flags.DEFINE_list("models", ["llada2_mini", "llada2_flash"], "Presets whose experts are costed.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of the batch. Default: 1; train: 8; serve: 16.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations and matrix products.")
_LAYERS = flags.DEFINE_integer("layers", 6, "Layers of the converted checkpoint, at least 2.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements in turn; the fastest counts.", lower_bound=1)
_DIRECTORY = flags.DEFINE_string("directory", ".", "Where the checkpoints to convert are made and removed.")
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "Rows of a batch.")
_PARTS = flags.DEFINE_list("parts", None, "recompute, prefix, known, commit, batches, continuous, cost. Default: all.")
_COST_MODEL = flags.DEFINE_string("cost_model", "llada2_mini", "Preset of the cost model.")
_CHIP = flags.DEFINE_string("chip", "v5p", "Chip of the cost model, v4 | v5e | v5p | v6e | tpu7x.")
_REQUESTS = flags.DEFINE_integer("requests", 200, "Requests that the server is asked.", lower_bound=1)
_CLIENTS = flags.DEFINE_integer("clients", 64, "Clients that ask at once.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the rows of the table.")


def main(argv) -> None:
    rows = []
    for row in _TABLES[argv[1]]():
        rows.append(row)
        if _JSON.value:  # as they come: an interruption loses none
            Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


def _on(platform: str) -> None:
    import jax  # after the flags are parsed: it takes seconds, as the modules below do

    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))  # "gpu" asks for ROCm as well


def _attention() -> Iterator[dict]:
    lengths = _LENGTHS.value or (["1024"] if _DEVICE.value else ["2048", "4096", "8192"])
    if not all(length.isdecimal() and int(length) > 0 for length in lengths):
        raise InputError(f"--lengths={','.join(lengths)}, expected positive integers")
    lengths = list(map(int, lengths))
    _on(_DEVICE.value or "cpu")  # nothing runs on the TPU that programs are compiled for
    if _DEVICE.value:
        from llada_jax.bench import step

        return step.table(
            _IMPLEMENTATIONS.value or ["dense", "blockwise"], lengths, _MODEL.value or "tiny", _ROWS.value or 1
        )
    from llada_jax.bench import attention

    names = _IMPLEMENTATIONS.value or attention.IMPLEMENTATIONS
    return attention.table(names, lengths, _PASSES.value, _TOPOLOGY.value)


def _train() -> Iterator[dict]:
    lengths = _LENGTHS.value or ["256"]
    if not all(length.isdecimal() and int(length) > 0 and int(length) % 32 == 0 for length in lengths):
        raise InputError(f"--lengths={','.join(lengths)}, expected multiples of 32")
    import jax

    if _DEVICE.value:
        _on(_DEVICE.value)
    from llada_jax.bench import train
    from llada_jax.model.forward import Execution

    tpu = jax.default_backend() == "tpu"
    execution = Execution(
        attention=(_IMPLEMENTATIONS.value or ["kernel" if tpu else "blockwise"])[0],
        experts="megablox" if tpu else "xla",
        dtype=_DTYPE.value,
    )
    for length in lengths:
        yield from train.table(_MODEL.value, _ROWS.value or 8, int(length), execution)


def _experts() -> Iterator[dict]:
    _on("cpu")
    from llada_jax.bench import experts

    return experts.table(_IMPLEMENTATIONS.value or experts.IMPLEMENTATIONS, _MODELS.value, _TOPOLOGY.value)


def _convert() -> Iterator[dict]:
    from llada_jax.bench import convert

    return convert.table(_DIRECTORY.value, _LAYERS.value, _ROUNDS.value)


def _decode() -> Iterator[dict]:
    from llada_jax.bench.decode_report import PARTS, report
    from llada_jax.chips import CHIPS
    from llada_jax.model.config import preset

    parts = _PARTS.value or list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--parts={part}, expected some of {', '.join(PARTS)}")
    if not all(rows.isdecimal() and int(rows) > 0 for rows in _BATCHES.value):
        raise InputError(f"--batches={','.join(_BATCHES.value)}, expected positive integers")
    if _CHIP.value not in CHIPS:
        raise InputError(f"--chip={_CHIP.value}, expected one of {', '.join(CHIPS)}")
    model, batches = _MODEL.value or "tiny_moe", [int(rows) for rows in _BATCHES.value]
    yield report(model, parts, batches, preset(_COST_MODEL.value), CHIPS[_CHIP.value])


def _serve() -> Iterator[dict]:
    from llada_jax.bench import serve

    model, rows = _MODEL.value or "tiny_moe", _ROWS.value or 16
    return serve.table(model, rows, _REQUESTS.value, _CLIENTS.value, _ROUNDS.value)


COMMANDS = {
    "attention": Command(
        """Attention of a training step or of decoding, by the compiler's estimate for a TPU, or timed on a device.

python tools/bench.py attention [--topology=v5p:2x2x1] [--lengths=2048,4096,8192] [--implementations=...] [--json=FILE]
python tools/bench.py attention --device=cpu [--model=tiny] [--lengths=1024]

The first compiles attention ahead of time for a TPU, without one, and prints for 16 fixed rows of packed documents the
tiles executed, the cycles that the compiler's schedules add up to on the busiest core of a device, their share of the
matrix units' peak (counting only pairs that the mask needs), the copies at HBM bandwidth in cycles, and the temporaries
in HBM: compiler-estimated, not measured. Where rows can be held against a bar (bench/bars.py) it says whether they meet
it. --passes=decode costs a batch that decodes one block per row against caches of --lengths. Baselines need the extra:
pip install -e '.[tpu,bench]'. The second times a training step of block diffusion with dense and with blockwise
attention on the device at hand.""",
        ("topology", "lengths", "implementations", "passes", "device", "model", "rows"),
    ),
    "train": Command(
        """The trainer's step of block diffusion, timed on the device at hand and split by part.

python tools/bench.py train [--device=cpu|gpu|tpu] [--model=PRESET] [--rows=8] [--lengths=256] [--dtype=bfloat16]

Without --model, the step of a dense model of 4.3 M parameters.""",
        ("device", "model", "rows", "lengths", "implementations", "dtype"),
    ),
    "experts": Command(
        """The grouped matmuls of one layer's experts, by the compiler's estimate: megablox beside tokamax.

python tools/bench.py experts [--topology=v5p:2x2x1] [--models=llada2_mini,llada2_flash] [--implementations=...]""",
        ("topology", "models", "implementations"),
    ),
    "convert": Command(
        """Import and export of a checkpoint, in turn with `cp -r` of the same files.

python tools/bench.py convert [--layers=6] [--rounds=3] [--directory=DIR]

Makes a Hugging Face checkpoint of random weights with the names, shapes and shards of LLaDA2.0-mini (9.5 GB with 6
layers) in DIR, imports and exports it in turn with `cp -r` and fsync of the same files, each from a cold cache, and
prints seconds, rates, and the most memory that a command held; DIR needs room for four copies, and is emptied
again.""",
        ("layers", "rounds", "directory"),
    ),
    "decode": Command(
        """Decoding, timed on the device at hand with random weights, and its cost model.

python tools/bench.py decode [--model=tiny_moe] [--batches=1,4,16,64] [--parts=recompute,prefix,known,commit,...]

Times 512 tokens, one per forward, with the cache and with the prefix computed again at every step (recompute); a step
after a prefix of 512 tokens against one after none (prefix); the first block after a prompt of which 2,048 tokens are
known, against all computed (known); a pass over windows of one and of two blocks (commit);
throughput and positions evaluated per token against batch (batches); 200 ragged requests, batched continuously
(continuous); and the cost model, with the experts that a batch reaches: bytes, FLOPs and roofline time of a pass of
--cost_model, and where it becomes compute-bound (cost).""",
        ("model", "batches", "parts", "cost_model", "chip"),
    ),
    "serve": Command(
        """The server under load, beside decoding the same requests without it; random weights.

python tools/bench.py serve [--model=tiny_moe] [--rows=16] [--requests=200] [--clients=64] [--rounds=3]

Clients in a process of their own stream ragged requests from a server, in turn with decoding them from a list. Prints
tokens per second of both, their ratio, and the seconds until the first block comes. Needs the extra: pip install -e
'.[serve]'.""",
        ("model", "rows", "requests", "clients", "rounds"),
    ),
}
_TABLES = {
    "attention": _attention,
    "train": _train,
    "experts": _experts,
    "convert": _convert,
    "decode": _decode,
    "serve": _serve,
}

if __name__ == "__main__":
    command_line.run(main, commands=COMMANDS, common=("json",))
