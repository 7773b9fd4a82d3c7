"""Files read and written past the page cache: the same bytes as by the ordinary way, wherever they lie."""

import errno
import os

import numpy as np
import pytest

from llada_jax.interop import direct
from tests.helpers.waiting import open_files


@pytest.fixture(params=["direct", "buffered"])
def mode(request, monkeypatch):
    """With direct I/O where the file system has it, and as on one that refuses it."""
    monkeypatch.setattr(direct, "_BUFFER_BYTES", 8192)
    monkeypatch.setattr(direct, "_THREAD", direct.threading.local())
    if request.param == "buffered":
        real = os.open

        def refuse(path, flags, *rest):
            if flags & direct._FLAG:
                raise OSError(errno.EINVAL, "Invalid argument", path)
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).bytes(count)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8192, 8193, 50_000])
def test_what_is_written_is_read(mode, tmp_path, size):
    data = random_bytes(size)
    path = tmp_path / "file"
    path.write_bytes(b"older and longer" * 10_000)
    with direct.Writer(str(path)) as file:
        for first in range(0, size, 3001):
            file.write(memoryview(data)[first : first + 3001])
    assert path.read_bytes() == data
    out = bytearray(size)
    assert direct.read_into(str(path), 0, memoryview(out)) == size
    assert out == data


@pytest.mark.parametrize(("first", "count"), [(0, 10), (1, 4095), (4095, 2), (4097, 20_000), (8191, 8193), (49_999, 1)])
def test_any_part(mode, tmp_path, first, count):
    data = random_bytes(50_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    out = bytearray(count)
    assert direct.read_into(str(path), first, memoryview(out)) == count
    assert out == data[first : first + count]


def test_a_file_that_ends_early_gives_what_it_has(mode, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(random_bytes(10_000))
    assert direct.read_into(str(path), 9_000, memoryview(bytearray(5_000))) == 1_000
    assert direct.read_into(str(path), 20_000, memoryview(bytearray(5))) == 0


def test_errors_name_the_file(mode, tmp_path):
    missing = str(tmp_path / "missing" / "file")
    for action in (lambda: direct.read_into(missing, 0, memoryview(bytearray(1))), lambda: direct.Writer(missing)):
        with pytest.raises(FileNotFoundError, match="missing"):
            action()


def test_a_failed_block_leaves_no_file_open(tmp_path):
    with pytest.raises(ZeroDivisionError), direct.Writer(str(tmp_path / "file")) as file:
        file.write(b"abc")
        assert open_files(tmp_path)
        raise ZeroDivisionError
    assert not open_files(tmp_path)
