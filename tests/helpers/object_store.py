"""A bucket that is a folder, for etils.epath and for our readers and writers of tensors; it cannot rename."""

import os

from etils.epath import backend, gpath

from llada_jax.checkpoint import files


class Bucket:
    """A backend of etils.epath."""

    def __init__(self, root):
        self._root = str(root)

    def local(self, path) -> str:
        return os.fspath(path).replace("gs://", f"{self._root}/", 1)

    def __getattr__(self, name):
        def call(*paths, **options):
            assert name not in ("rename", "replace"), "object stores cannot rename"
            found = getattr(backend.os_backend, name)(*map(self.local, paths), **options)
            return [path.replace(f"{self._root}/", "gs://", 1) for path in found] if name == "glob" else found

        return call


def make_bucket(root, monkeypatch) -> Bucket:
    """gs://NAME is root/NAME until the test ends."""
    bucket = Bucket(root)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", bucket)
    kvstore = files._kvstore
    monkeypatch.setattr(files, "_kvstore", lambda folder, name: kvstore(bucket.local(folder), name))
    return bucket
