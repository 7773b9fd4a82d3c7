"""Pictures of the mask."""

import numpy as np
import pytest

import llada_jax
from llada_jax.attention import picture
from tests.test_tools import run


def test_kinds_are_the_mask():
    kind = picture.kinds([3, 5], 2, "document")
    mask = llada_jax.block_diffusion_mask(8, 2, np.repeat([1, 2], [3, 5]), "document")
    assert np.array_equal(kind != picture.HIDDEN, mask)
    assert set(np.unique(kind[:8, :8])) == {picture.HIDDEN, picture.NOISY_NOISY}
    assert set(np.unique(kind[:8, 8:])) == {picture.HIDDEN, picture.NOISY_CLEAN}
    assert set(np.unique(kind[8:, 8:])) == {picture.HIDDEN, picture.CLEAN_CLEAN}


def test_text():
    done = run("plot_mask", "--documents=2,1", "--block_size=1", "--ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["n..|...", ".n.|x..", "..n|...", "---+---", "...|c..", "...|cc.", "...|..c"]


@pytest.mark.parametrize("suffix,magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_picture(tmp_path, suffix, magic):
    path = tmp_path / f"mask.{suffix}"
    done = run("plot_mask", "--documents=5,3", f"--output={path}")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(magic) and path.stat().st_size < 200_000


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--documents=3,0", "--ascii"], "--documents"),
        (["--documents=600", "--ascii"], "512"),
        (["--block_size=0", "--ascii"], "--block_size=0"),
        (["--output=mask.pdf"], "mask.pdf"),
        (["--block_origin=row", "--ascii"], "row"),
        ([], "--output"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run("plot_mask", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
