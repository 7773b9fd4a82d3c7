"""The rate of import and export compared with `cp` and fsync, on a synthetic checkpoint with the hub's layout.

Names, shapes, dtypes and sharding are those of LLaDA2.0-mini at full width, with fewer layers: bfloat16, one tensor per
expert, and shards of at most 5 GB with tensors in alphabetical order.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from llada_jax.checkpoint.stream import slabs
from llada_jax.interop import hf_config, huggingface
from llada_jax.interop.export import SHARD_BYTES, shard_name
from llada_jax.interop.huggingface import source_name, stored_shape
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig, preset

TOOLS = Path(__file__).parents[2] / "tools"
_RANDOM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class CommandUsage:
    """What one command used: wall-clock seconds, CPU seconds, and its peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def write_source(folder: Path, config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a Hugging Face folder of random bfloat16 weights; returns the bytes of its tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, layer in parameters.leaves(config).values():
        for expert in range(parameter.shape[0]) if parameter.per_expert else [None]:
            name, (rows, *columns) = source_name(parameter, layer, expert), stored_shape(parameter)
            shapes[name] = (shapes[name][0] + rows if name in shapes else rows, *columns)  # fused rows follow rows
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    folder.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = shard_name(number, len(shards))
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(folder / file, {name: (shapes[name], shard[name]) for name in sorted(shard)}, seed=number)
    total = sum(sum(shard.values()) for shard in shards)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hf = hf_config.exported(config, {}, np.dtype(np.float32)) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(hf))
    return total


def _write_shard(path: Path, tensors: dict[str, tuple[tuple[int, ...], int]], seed: int) -> None:
    header, offset = {}, 0
    for name, (shape, size) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            file.write(rng.bytes(min(offset, _RANDOM_BYTES)))
            offset -= _RANDOM_BYTES
        os.fsync(file.fileno())


def copy(source: Path, out: Path) -> CommandUsage:
    """`cp -r` and fsync of every file."""

    def sync():
        for path in out.iterdir():
            _with_file(path, os.fsync)

    return _run(["cp", "-r", str(source), str(out)], sync)


def import_folder(source: Path, out: Path) -> CommandUsage:
    return _run([sys.executable, str(TOOLS / "hf_to_orbax.py"), f"--source={source}", f"--out={out}"])


def export_folder(source: Path, out: Path) -> CommandUsage:
    return _run([sys.executable, str(TOOLS / "orbax_to_hf.py"), f"--checkpoint={source}", f"--out={out}"])


def interpreter() -> CommandUsage:
    """Runs a command that imports everything and converts nothing."""
    return _run([sys.executable, str(TOOLS / "orbax_to_hf.py"), "--help"])


def forget(folder: Path) -> None:
    """Flushes a folder to the disk and drops it from the page cache, so that all commands start alike."""
    for path in folder.rglob("*"):
        if path.is_file():
            _with_file(path, lambda file: (os.fsync(file), os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)))


def _run(command: list[str], then: Callable[[], None] = lambda: None) -> CommandUsage:
    """Runs a command, then `then`. Raises RuntimeError if the command fails."""
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile() as log:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        then()
        seconds = time.monotonic() - begun
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {log.read().decode()}")
    return CommandUsage(seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def differences(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not byte for byte equal in two Hugging Face folders."""
    first, second = (huggingface.open_tensors(epath.Path(folder)) for folder in (a, b))
    differing = set(first) ^ set(second)
    for name in first.keys() & second.keys():
        x, y = first[name], second[name]
        bounds = slabs(x.shape, x.dtype.itemsize, 0)
        same = (x.shape, x.dtype) == (y.shape, y.dtype)
        if not same or any(x.read(*each).tobytes() != y.read(*each).tobytes() for each in bounds):
            differing.add(name)
    return sorted(differing)


def _with_file(path: Path, function: Callable[[int], object]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        function(file)
    finally:
        os.close(file)


def table(directory: str, layers: int, rounds: int) -> Iterator[dict]:
    """Measures cp, import and export in turn; prints a line per command and yields its values.

    Before each command the folder is dropped from the page cache. Files created in `directory` are removed again.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=directory))
    try:
        source, copied, ours, exported = (folder / name for name in ("source", "copied", "ours", "exported"))
        size = write_source(source, preset("llada2_mini").replace(num_layers=layers))
        base = interpreter().peak_bytes
        print(f"{size / 1e9:.2f} GB, imports alone hold {base / 2**20:.0f} MiB; load average {os.getloadavg()[0]:.1f}")
        print("round command seconds  MB/s  CPU seconds  MiB above the imports")
        commands = {
            "cp": lambda: copy(source, copied),
            "import": lambda: import_folder(source, ours),
            "export": lambda: export_folder(ours, exported),
        }
        seconds = {}
        for number in range(rounds):
            runs = {}
            for name, command in commands.items():
                forget(folder)
                runs[name] = command()
            shutil.rmtree(copied)
            for name, run in runs.items():
                above = max(0, run.peak_bytes - base)
                print(f"{number:5} {name:7} {run.seconds:7.1f} {size / run.seconds / 1e6:5.0f} {run.cpu_seconds:12.1f} "
                      f"{above / 2**20:22.0f}", flush=True)  # fmt: skip
                yield {"command": name, "bytes": size, "bytes_above_imports": above} | dataclasses.asdict(run)
                seconds[name] = min(run.seconds, seconds.get(name, run.seconds))
            if differing := differences(source, exported):
                raise AssertionError(f"{differing[0]} and {len(differing) - 1} more tensors have changed")
            shutil.rmtree(ours)
            shutil.rmtree(exported)
        for name in ("import", "export"):
            print(f"{name}: {seconds['cp'] / seconds[name]:.0%} of the rate of cp (fastest of {rounds} each)")
        print(f"every tensor came back byte for byte; load average {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(folder)
