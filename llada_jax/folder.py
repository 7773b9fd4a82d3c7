"""The files of a Hugging Face folder, none of which may lead out of it."""

import os
from pathlib import PurePosixPath

from etils import epath

from llada_jax.errors import InputError


def open_source(source: str) -> epath.Path:
    """The path of a source; of hf://OWNER/NAME, the folder of the hub's cache that it is downloaded to first.

    Raises InputError when it cannot be downloaded.
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


def file_in(folder: epath.Path, name: str, where: str = "") -> epath.Path:
    """The path of a file of the folder, there or not.

    A symbolic link may lead within the folder, or from a snapshot of the hub's cache to its blobs. `where` is named
    before the file in the error. Raises InputError when the file is elsewhere.
    """
    where = f"{where}: " if where else ""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise InputError(f"{where}{name!r} leads out of the folder")
    if len(name) > 255:
        raise InputError(f"{where}{name[:20]!r}... has {len(name)} characters, which no file name has")
    path = folder / name
    if "://" in os.fspath(path):
        return path
    root = os.path.realpath(folder)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    found = os.path.realpath(path)
    if not any(found.startswith(os.path.join(each, "")) for each in roots):
        raise InputError(f"{where}{path} is a link out of the folder, to {found}")
    return path
