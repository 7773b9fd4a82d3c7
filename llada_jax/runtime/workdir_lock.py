"""Locks a workdir: one trainer at a time, on a disk that can be written."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from llada_jax.errors import InputError

LOCK = "trainer.lock"
# Errors of file systems without locks, and of disks that cannot be written.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Creates `workdir` and locks it for the body; a second trainer is refused with the host and pid of the first.

    The kernel's lock on WORKDIR/trainer.lock ends with the process, in any way. On a file system without locks, a line
    says so. If an InputError leaves the body, a workdir that was created here and is still empty is removed. Raises
    InputError if the workdir is locked or cannot be written.
    """
    try:
        made = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        file = _locked(workdir / LOCK)
    except OSError as error:
        raise InputError(f"--workdir={workdir}: cannot be written ({error.strerror or error})") from error
    with file:
        try:
            yield
        except InputError:
            if made and [path.name for path in workdir.iterdir()] == [LOCK]:
                (workdir / LOCK).unlink()
                workdir.rmdir()
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise InputError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error
            raise


def is_claimed(workdir: Path) -> bool:
    """Whether a trainer has locked `workdir` now; False on a file system without locks."""
    try:
        with open(workdir / LOCK, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _locked(path: Path):
    """The open lock file; closing it releases the lock."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(f"--workdir={path.parent}: {holder} is training in it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{path}: no locks on this file system ({error.strerror}); start no second trainer", file=sys.stderr)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its holder has removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
