"""The picture of how an answer filled."""

import numpy as np
import pytest

from llada_jax.sampling import trajectory


def test_blocks_count_from_the_start_of_the_prompt():
    assert trajectory.blocks(6, range(9), 4) == [slice(0, 2), slice(2, 6), slice(6, 9)]
    assert trajectory.blocks(8, range(4), 4) == [slice(0, 4)]
    assert trajectory.blocks(1, range(1), 4) == [slice(0, 1)]


def test_terminal_shows_every_token_once_and_colours_by_step():
    steps = np.array([0, 1, 1, 0, 2])
    text = trajectory.terminal(["a", " b", "\n", "c", ""], steps, [slice(0, 2), slice(2, 5)])
    assert text.plain == "block   1   2 steps  a·b\nblock   2   3 steps  ⏎c∅\n"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["a"] == styles["c"] != styles["·b"] == styles["⏎"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_draw_writes_a_picture_with_the_tokens(tmp_path, suffix):
    path = tmp_path / f"trajectory.{suffix}"
    steps = np.array([0, 1, 1, 0, 2])
    trajectory.draw(["one", "two", "$", "<b>", "\ufffd"], steps, np.full(5, 0.5), [slice(0, 2), slice(2, 5)], str(path))
    assert path.stat().st_size > 1000
    assert suffix == "png" or "one" in path.read_text()
