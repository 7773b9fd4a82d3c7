"""Files of a Hugging Face folder; no name or link may lead out of it."""

import os
from pathlib import PurePosixPath

from etils import epath

from llada_jax.errors import InputError


def local_path(source: str) -> epath.Path:
    """The local path of a source; hf://OWNER/NAME[@REVISION] is downloaded to the hub's cache first.

    Raises InputError if it cannot be downloaded.
    """
    if not source.startswith("hf://"):
        return epath.Path(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"{source}: needs the package huggingface_hub") from error
    name, _, revision = source.removeprefix("hf://").partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return epath.Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # of the network, the hub, the disk: none has a common base
        raise InputError(f"{source}: cannot be downloaded ({type(error).__name__}: {error})") from error


def file_in(folder: epath.Path, name: str, place: str = "") -> epath.Path:
    """The path of a file in the folder, which need not exist.

    A symbolic link may lead within the folder, or from a snapshot of the hub's cache to its blobs. Raises InputError if
    the file is elsewhere; `place` is named first in the message.
    """
    place = f"{place}: " if place else ""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise InputError(f"{place}{name!r} leads out of the folder")
    if len(name) > 255:
        raise InputError(f"{place}{name[:20]!r}... has {len(name)} characters, which no file name has")
    path = folder / name
    if "://" in os.fspath(path):
        return path
    root = os.path.realpath(folder)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    target = os.path.realpath(path)
    if not any(target.startswith(os.path.join(each, "")) for each in roots):
        raise InputError(f"{place}{path} is a link out of the folder, to {target}")
    return path
