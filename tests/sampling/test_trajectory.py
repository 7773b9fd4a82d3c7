"""The picture of how an answer filled."""

import numpy as np
import pytest

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.sampling import trajectory
from llada_jax.sampling.history import History


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


TOKENIZER = byte_tokenizer(256, 257)


def test_writes_go_block_by_block_and_step_by_step():
    """A prompt of one token, blocks of 4: the answer is "ab" + "c" of the second block."""
    tokens, steps, confidence = np.frombuffer(b"abcd", np.uint8), np.array([1, 0, 1, 0]), np.array([0.5, 1, 0.333, 1])
    spans = trajectory.blocks(1, tokens, 4)
    assert trajectory.writes([60], tokens, steps, confidence, spans, TOKENIZER) == [
        [1, 0, 0, "b", 1.0], [0, 1, 1, "a", 0.5], [2, 1, 1, "c", 0.33], [3, 2, 0, "d", 1.0],
    ]  # fmt: skip


def test_writes_of_a_history_have_its_edits_but_nothing_behind_the_end():
    history = History(*map(np.array, ([0, 2, 0, 1], [*b"xya", 98], [0, 0, 1, 2], [3, 3, 4, 5], [0.1, 0.2, 0.3, 0.4])))
    spans = trajectory.blocks(0, range(2), 4)
    found = trajectory.writes([], np.array([97, 98]), np.array([1, 2]), np.ones(2), spans, TOKENIZER, history)
    assert found == [[0, 3, 0, "x", 0.1], [0, 4, 1, "a", 0.3], [1, 5, 2, "b", 0.4]]


def test_no_answer_has_no_writes():
    nothing = np.zeros(0, np.int32)
    assert trajectory.writes([60], nothing, nothing, nothing, [], TOKENIZER) == []
