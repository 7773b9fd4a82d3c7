"""A workdir on an object store, where files can be neither appended to nor renamed: --workdir=gs://BUCKET/RUN.

Checkpoints are written to the store directly. The small files of a run (config.json, metrics.jsonl, event files,
goodput.json) are written to a temporary local directory. It starts as a copy of the store's files, so that a run can
resume on another machine. It is copied back every half minute, before each saved step, and at the end. If a machine
dies, only rows after the last saved step are lost, and the resumed run writes them again.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from llada_jax.errors import InputError

_SECONDS = 30.0
_ATTEMPTS = 3


class RemoteWorkdir:
    """Copies changed files of `local` to `remote`; does nothing if remote is None.

    A failed copy is reported once and retried with the next push.
    """

    def __init__(self, local: Path, remote: epath.Path | None = None):
        self.local, self.remote = local, remote
        self._copied: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._failing = False

    def pull(self) -> None:
        """Copies the store's files to `local`, except event files: each start of a run writes its own."""
        if self.remote.is_dir():
            for path in self.remote.iterdir():
                if not path.name.startswith("events.out") and not path.is_dir():
                    copy = self.local / path.name
                    copy.write_bytes(path.read_bytes())
                    self._copied[path.name] = _version(copy)

    def push(self) -> bool:
        """Copies changed files to the store. Returns whether the store has all files now."""
        if self.remote is None:
            return True
        with self._lock:
            try:
                for path in sorted(self.local.rglob("*")):
                    if path.is_file() and path.suffix not in (".partial", ".lock"):
                        self._copy(path)
            except Exception as error:  # any error of the store's client; the store may be back next time
                if not self._failing:
                    print(f"{self.remote}: cannot copy metrics there, will retry: {error}", file=sys.stderr, flush=True)
                self._failing = True
                return False
            self._failing = False
            return True

    def _copy(self, path: Path) -> None:
        name, version = path.relative_to(self.local).as_posix(), _version(path)
        if self._copied.get(name) != version:
            target = self.remote / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            self._copied[name] = version


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike, config: ConfigDict) -> Iterator[tuple[RemoteWorkdir, ConfigDict]]:
    """Yields (a RemoteWorkdir, the config). Small files go to its `local`, which is a local workdir itself.

    For a workdir on a store, config.checkpoint.directory is set to a folder there. Only process 0 writes to the store.
    Raises InputError if rows would have to be packed into a store, and at the end if the store does not accept the last
    files; they stay in the local directory.
    """
    if "://" not in os.fspath(workdir):
        yield RemoteWorkdir(Path(workdir)), config
        return
    remote = epath.Path(workdir)
    if config.data.source and not config.data.cache:
        raise InputError(
            f"--workdir={workdir}: rows cannot be packed there; set config.data.path to packed rows, or "
            "config.data.cache to a local folder"
        )
    config = config.copy_and_resolve_references()
    config.checkpoint.directory = config.checkpoint.directory or os.fspath(remote / "checkpoints")
    folder = RemoteWorkdir(Path(tempfile.mkdtemp(prefix="llada_jax_")), remote)
    folder.pull()
    with _pushing(folder) if jax.process_index() == 0 else contextlib.nullcontext(RemoteWorkdir(folder.local)) as mine:
        yield mine, config
    shutil.rmtree(folder.local, ignore_errors=True)


@contextlib.contextmanager
def _pushing(folder: RemoteWorkdir) -> Iterator[RemoteWorkdir]:
    """Pushes every half minute and at the end. Raises InputError if the last push fails."""
    ended = threading.Event()

    def keep_pushing():
        while not ended.wait(_SECONDS):
            folder.push()

    thread = threading.Thread(target=keep_pushing, name="remote_workdir", daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        ended.set()
        thread.join()
        for attempt in range(_ATTEMPTS):
            if folder.push():
                break
            time.sleep(2.0**attempt)
        else:
            raise InputError(
                f"{folder.remote}: cannot be written to; the last metrics of the run are in {folder.local}"
            )


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
