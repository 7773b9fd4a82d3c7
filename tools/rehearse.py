"""Compiles a training step for TPU slices that are not there, and says whether it fits and what it would cost.

python tools/rehearse.py --config=configs/wsd.py:llada2_mini --topology=v5p:4x4x4 [--slices=N] [--json=FILE]
python tools/rehearse.py --decode --config=configs/wsd.py:llada2_mini --topology=v5p:2x2x1 --config.mesh.tensor=4 ...

The step is the trainer's own, over the mesh of the config. Everything printed is compiler-estimated: memory from the
compiler; seconds from its schedules, and from bytes over HBM and the links. Serial MFU adds up all parts, collectives
where they do not run behind arithmetic; overlapped MFU is that of the larger of arithmetic and communication. Exits 1
when the step does not fit. Attention must be the kernel or dense, experts megablox: loops of plain XLA run as long as
the data say, so they have no estimate.

--decode compiles a pass of decoding instead (weights and caches in bfloat16, or experts in int8): --rows requests over
all chips, of --canvas positions, --filled of them in the caches; blocks are of config.schedule.block_size.
--prefill=TOKENS compiles the pass that computes a chunk of so many tokens of a prompt, after --filled of it: one prompt
for each part into which the mesh splits the rows. With --mesh=auto it tries the meshes worth trying, one after the
other, and names the fastest.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llada_jax import command_line
from llada_jax.config_flag import resolved
from llada_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, FILE.py:MODEL[,option=N].")
_TOPOLOGY = flags.DEFINE_string("topology", None, "A slice, e.g. v5p:4x4x4, v6e:16x16, tpu7x:4x4x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "How many of them, joined by the data-centre network.", lower_bound=1)
_HALVES = flags.DEFINE_enum("halves", "both", ["both", "noisy", "clean"], "noisy: the stable phase; clean: AR.")
_DOCUMENTS = flags.DEFINE_integer("mean_document", 1024, "Tokens of a packed document: 512, 1024; 0: one a row.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 32, "Of the diffusion, for counting tiles.", lower_bound=1)
_BUSIEST = flags.DEFINE_float("busiest", 1.0, "Load of the busiest shard's experts over the mean; 1 is balanced.")
_OPERATIONS = flags.DEFINE_integer("operations", 0, "Print so many of the dearest operations.", lower_bound=0)
_DECODE = flags.DEFINE_bool("decode", False, "Of a pass of decoding, not of a training step.")
_ROWS = flags.DEFINE_integer("rows", 64, "--decode: requests in the batch, over all chips.", lower_bound=1)
_CANVAS = flags.DEFINE_integer("canvas", 4096, "--decode: positions of the longest request.", lower_bound=1)
_FILLED = flags.DEFINE_integer("filled", 2048, "--decode: positions in the caches.", lower_bound=0)
_PREFILL = flags.DEFINE_integer("prefill", None, "--decode: of a chunk of so many tokens of a prompt.", lower_bound=1)
_MESH = flags.DEFINE_enum("mesh", "config", ["config", "auto"], "--decode: auto tries several, and names the fastest.")
_EXPERTS_DTYPE = flags.DEFINE_enum(
    "experts_dtype", "bfloat16", ["bfloat16", "int8"], "--decode: of the weights of routed experts."
)
_SAVE = flags.DEFINE_string("save", None, "File for the compiled step: --config.compiled_step=FILE of the trainer.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers, every operation included.")
_OF_A_STEP = (_HALVES, _DOCUMENTS, _BLOCK_SIZE, _BUSIEST, _SAVE)
_NOT_OF_RL = (_HALVES, _DOCUMENTS, _BLOCK_SIZE, _SAVE)
_OF_DECODING = (_ROWS, _CANVAS, _FILLED, _PREFILL, _MESH, _EXPERTS_DTYPE)


def main(argv) -> None:
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise InputError("--config=FILE.py:MODEL and --topology=CHIP:SHAPE are required; see --help")
    _check_flags()
    if _MESH.value == "auto":
        return _try_meshes(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="llada_jax_") as dumps:
        _rehearse(Path(dumps))


def _try_meshes(given: list[str]) -> None:
    """Each mesh in a process of its own: the compiler dumps all programs of a process into one folder."""
    from llada_jax.chips import parse_topology
    from llada_jax.pod.decoding.meshes import arguments, fields_of, table
    from llada_jax.sampling.meshes import candidates, name_of
    from llada_jax.training import run_model

    topology = parse_topology(_TOPOLOGY.value)
    model = run_model.named(run_model.fitted(resolved(_CONFIG)))
    results = []
    tried = candidates(model, topology.num_devices * _SLICES.value, _ROWS.value)
    for i, sizes in enumerate(tried, 1):
        print(f"{i} of {len(tried)}: {name_of(sizes)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="llada_jax_") as folder:
            out = Path(folder, "out.json")
            command = [sys.executable, __file__, *given, *arguments(sizes), "--mesh=config", f"--json={out}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not out.exists():
                raise InputError(f"{name_of(sizes)}: {_reason(done)}")
            results.append((sizes, json.loads(out.read_text())))
    if not any(values["fits"] for _, values in results):
        sys.exit(f"no mesh of {len(tried)} fits a chip of {topology.name}; try fewer --rows or a larger slice")
    print(table(results, _ROWS.value))
    if _JSON.value:
        _write([{"fields": fields_of(sizes)} | values for sizes, values in results])


def _reason(done: subprocess.CompletedProcess) -> str:
    """Why a rehearsal failed, in one line."""
    (*_, last) = done.stderr.strip().splitlines() or [f"died with code {done.returncode}"]
    return last.removeprefix("error: ")


def _rehearse(dumps: Path) -> None:
    import jax

    from llada_jax.pod import aot

    # Before libtpu is loaded, which reads it once.
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {aot.dump_flags(dumps)}".strip()
    jax.config.update("jax_platforms", "cpu")  # nothing runs on the TPU that the step is compiled for
    from llada_jax.chips import parse_topology
    from llada_jax.pod import report
    from llada_jax.pod.decoding.rehearse_decode import rehearse_decode
    from llada_jax.pod.lower import DoesNotFit, Slices
    from llada_jax.pod.rehearse import Packing, rehearse
    from llada_jax.pod.reinforcement.rehearse_rl import rehearse_rl

    slices = Slices(parse_topology(_TOPOLOGY.value), _SLICES.value)
    packing = Packing(_DOCUMENTS.value, _BLOCK_SIZE.value, _BUSIEST.value)
    try:
        if _DECODE.value:
            sizes = _ROWS.value, _CANVAS.value, _FILLED.value
            how = dict(chunk=_PREFILL.value, int8_experts=_EXPERTS_DTYPE.value == "int8")
            result, describe = (
                rehearse_decode(resolved(_CONFIG), slices, *sizes, dumps, **how),
                report.describe_decoding,
            )
        elif resolved(_CONFIG).rl.enabled:
            result, describe = rehearse_rl(resolved(_CONFIG), slices, _BUSIEST.value, dumps), report.describe_rl
        else:
            describe = report.describe_step
            result = rehearse(resolved(_CONFIG), slices, packing, _HALVES.value, _SAVE.value, dumps)
    except DoesNotFit as error:
        if _JSON.value:
            capacity = slices.topology.chip.hbm_bytes
            _write({"fits": False, "hbm_bytes": error.hbm_bytes, "hbm_capacity_bytes": capacity, "chips": slices.chips})
        sys.exit(report.does_not_fit(error.hbm_bytes, slices))
    print(describe(result))
    for line in sorted(result.lines, key=lambda line: -line.seconds)[: _OPERATIONS.value]:
        print(f"{line.seconds * 1e3:9.3f} ms {line.part:11} {line.runs:6g} x {line.name:44.44} {line.scope[-60:]}")
    if _JSON.value:
        _write(result.to_json())
    if not result.fits:
        sys.exit(report.does_not_fit(result.to_json()["hbm_bytes"], slices))


def _check_flags() -> None:
    """Before minutes of compiling: raises InputError on a flag that would count for nothing, or a file of nowhere."""
    for flag in _OF_A_STEP if _DECODE.value else _OF_DECODING:
        if flag.present:
            raise InputError(
                f"--{flag.name}: {'of a training step, not of' if _DECODE.value else 'only with'} --decode; see --help"
            )
    for flag in _NOT_OF_RL if resolved(_CONFIG).rl.enabled else ():
        if flag.present:
            raise InputError(f"--{flag.name}: not of reinforcement learning (config.rl.enabled); see --help")
    for flag in (_SAVE, _JSON):
        if flag.value and not Path(flag.value).absolute().parent.is_dir():
            raise InputError(f"--{flag.name}={flag.value}: no such folder")


def _write(values: dict | list) -> None:
    Path(_JSON.value).write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)
