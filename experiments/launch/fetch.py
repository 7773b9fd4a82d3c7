"""Copies a folder of a bucket to the local disk, such as packed rows: files of the right size are not copied again.

python experiments/launch/fetch.py --source=gs://BUCKET/ROWS --out=DIR
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags
from etils import epath

from llada_jax import command_line
from llada_jax.errors import InputError

_SOURCE = flags.DEFINE_string("source", None, "Folder, gs:// or local.")
_OUT = flags.DEFINE_string("out", None, "Local folder; made if it does not exist.")
_THREADS = 16


def main(argv) -> None:
    del argv
    if not _SOURCE.value or not _OUT.value:
        raise InputError("--source=FOLDER and --out=DIR are required; see --help")
    source, out = epath.Path(_SOURCE.value), Path(_OUT.value)
    if not source.is_dir():
        raise InputError(f"--source={source}: no such folder")
    with ThreadPoolExecutor(_THREADS) as pool:
        copied = sum(pool.map(lambda pair: _copy(*pair), list(_pairs(source, out))))
    print(f"{copied:,} bytes copied from {source} to {out}", flush=True)


def _pairs(source: epath.Path, out: Path):
    for path in source.iterdir():
        if path.is_dir():
            yield from _pairs(path, out / path.name)
        else:
            yield path, out / path.name


def _copy(source: epath.Path, target: Path) -> int:
    """Bytes copied. The file appears when it is whole."""
    length = source.stat().length
    if target.exists() and target.stat().st_size == length:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with source.open("rb") as read, open(partial, "wb") as write:
        shutil.copyfileobj(read, write, 16 * 2**20)
    partial.replace(target)
    return length


if __name__ == "__main__":
    command_line.run(main)
