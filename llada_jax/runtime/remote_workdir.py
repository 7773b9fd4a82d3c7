"""A workdir on an object store, where files can be neither appended to nor renamed: --workdir=gs://BUCKET/RUN.

Checkpoints are written there directly. The small files of a run (config.json, metrics.jsonl, event files, goodput.json)
are written in a temporary local directory: it starts with those of the store, so that a run resumes on another machine,
and is copied there every half minute, before a step is saved and at the end. A machine that dies takes only rows with
it that come after the step that is resumed from, and are made again.
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


class Mirror:
    """Copies files of `local` that changed to `remote`; does nothing when remote is None.

    A copy that fails is said once, and tried again with the next one.
    """

    def __init__(self, local: Path, remote: epath.Path | None = None):
        self.local, self.remote = local, remote
        self._copied: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._failing = False

    def pull(self) -> None:
        """Copies the files of the store here, but for event files: each start of a run writes its own."""
        if self.remote.is_dir():
            for path in self.remote.iterdir():
                if not path.name.startswith("events.out") and not path.is_dir():
                    copy = self.local / path.name
                    copy.write_bytes(path.read_bytes())
                    self._copied[path.name] = _version(copy)

    def push(self) -> bool:
        """Whether the store has all files now."""
        if self.remote is None:
            return True
        with self._lock:
            try:
                for path in sorted(self.local.rglob("*")):
                    if path.is_file() and path.suffix not in (".partial", ".lock"):
                        self._copy(path)
            except Exception as error:  # whatever the store's client raises: it may be there again next time
                if not self._failing:
                    print(f"{self.remote}: cannot copy metrics there, trying on: {error}", file=sys.stderr, flush=True)
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
def open_workdir(workdir: str | os.PathLike, config: ConfigDict) -> Iterator[tuple[Mirror, ConfigDict]]:
    """Yields a Mirror whose `local` is the folder to write small files in (of a local workdir, the workdir itself), and
    the config; for a workdir on a store, with config.checkpoint.directory there.

    Raises InputError when rows would have to be packed into a store, and at the end when the store does not take the
    last files; they stay in the local directory then. Only process 0 of a run writes to the store.
    """
    if "://" not in os.fspath(workdir):
        yield Mirror(Path(workdir)), config
        return
    remote = epath.Path(workdir)
    if config.data.source and not config.data.cache:
        raise InputError(
            f"--workdir={workdir}: rows cannot be packed there; set config.data.path to packed rows, or "
            "config.data.cache to a local folder"
        )
    config = config.copy_and_resolve_references()
    config.checkpoint.directory = config.checkpoint.directory or os.fspath(remote / "checkpoints")
    mirror = Mirror(Path(tempfile.mkdtemp(prefix="llada_jax_")), remote)
    mirror.pull()
    with _pushing(mirror) if jax.process_index() == 0 else contextlib.nullcontext(Mirror(mirror.local)) as mine:
        yield mine, config
    shutil.rmtree(mirror.local, ignore_errors=True)


@contextlib.contextmanager
def _pushing(mirror: Mirror) -> Iterator[Mirror]:
    """Pushes every half minute, and at the end. Raises InputError when that fails."""
    ended = threading.Event()

    def keep_pushing():
        while not ended.wait(_SECONDS):
            mirror.push()

    thread = threading.Thread(target=keep_pushing, name="mirror", daemon=True)
    thread.start()
    try:
        yield mirror
    finally:
        ended.set()
        thread.join()
        for attempt in range(_ATTEMPTS):
            if mirror.push():
                break
            time.sleep(2.0**attempt)
        else:
            raise InputError(
                f"{mirror.remote}: cannot be written to; the last metrics of the run are in {mirror.local}"
            )


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
