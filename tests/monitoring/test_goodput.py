"""Where the wall time of a run goes, on a clock that the test moves."""

import json

import jax.numpy as jnp
import pytest

from llada_jax.monitoring.goodput import LOST, Goodput


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def goodput_of(tmp_path, clock, wall=None):
    return Goodput(tmp_path, clock, wall or clock)


def run(goodput, clock, first, last, seconds=1.0, every=5):
    """Steps of so many seconds."""
    goodput.begin_steps(first)
    for step in range(first + 1, last + 1):
        clock.passes(seconds)
        if step % every == 0:
            goodput.mark(step)


def test_every_second_is_counted_once(tmp_path):
    clock = Clock()
    goodput = goodput_of(tmp_path, clock)
    clock.passes(3)
    with goodput.spent("restore"):
        clock.passes(7)
    clock.passes(2)
    goodput.begin_steps(0)
    clock.passes(10)
    with goodput.spent("evaluate"):
        clock.passes(4)
    assert goodput.mark(5) == pytest.approx(10 / 5)
    with goodput.spent("save"):
        clock.passes(1)
    clock.passes(6)
    assert goodput.mark(8) == pytest.approx(2.0)
    expected = {"start": 5, "restore": 7, "evaluate": 4, "save": 1, "step": 16}
    assert goodput.seconds == pytest.approx(dict.fromkeys(("step", *LOST), 0.0) | expected)
    assert goodput.share == pytest.approx(16 / 33) and sum(goodput.seconds.values()) == pytest.approx(clock() - 1000)
    assert goodput.describe().startswith("goodput 48.5% of 33 s; the rest: restore 21.2%, start 15.2%, evaluate 12.1%")


def test_an_error_inside_is_counted_too(tmp_path):
    clock = Clock()
    goodput = goodput_of(tmp_path, clock)
    with pytest.raises(RuntimeError), goodput.spent("save"):
        clock.passes(5)
        raise RuntimeError
    assert goodput.seconds["save"] == 5


def test_steps_done_again_after_a_restart_and_the_time_between(tmp_path):
    clock = Clock()
    run(goodput_of(tmp_path, clock), clock, 0, 10)
    clock.passes(100)  # killed after step 10, of which step 4 is saved
    again = goodput_of(tmp_path, clock)
    clock.passes(2)
    run(again, clock, 4, 15)  # one mark at 5, at 10 and at 15
    assert again.seconds == pytest.approx(
        dict.fromkeys(("step", *LOST), 0.0) | {"step": 10 + 5, "redone": 6, "start": 2, "down": 100}
    )
    record = json.loads((tmp_path / "goodput.json").read_text())
    assert record["furthest_step"] == 15 and record["wall_seconds"]["redone"] == pytest.approx(6)
    assert record["goodput"] == pytest.approx(15 / 123, abs=1e-4)


def test_a_mark_that_spans_the_furthest_step_is_shared_out(tmp_path):
    clock = Clock()
    run(goodput_of(tmp_path, clock), clock, 0, 10)
    again = goodput_of(tmp_path, clock)
    run(again, clock, 8, 20, every=20)
    assert again.seconds["redone"] == pytest.approx(2) and again.seconds["step"] == pytest.approx(10 + 10)


def test_a_clock_that_was_set_back_takes_no_time_away(tmp_path):
    clock, wall = Clock(), Clock(5000)
    run(goodput_of(tmp_path, clock, wall), clock, 0, 5)
    wall.passes(-3600)
    assert goodput_of(tmp_path, clock, wall).seconds["down"] == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"written": 1}', '{"written": "x", "furthest_step": 1}'])
def test_a_damaged_record_is_begun_anew(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    assert sum(goodput_of(tmp_path, Clock()).seconds.values()) == 0


def test_first_call_of_each_kind_of_pass_is_compilation(tmp_path):
    clock = Clock()
    goodput = goodput_of(tmp_path, clock)

    def train_step(state, halves):
        clock.passes(20 if state < 2 else 1)
        return state + 1, {"loss": jnp.zeros(())}

    step = goodput.timed_steps(train_step)
    goodput.begin_steps(0)
    state = 0
    for halves in ("both", "noisy", "both", "noisy"):
        state, _ = step(state, halves)
    goodput.mark(4)
    assert goodput.seconds["compile"] == 40 and goodput.seconds["step"] == 2


def test_a_wait_for_data_counts_only_while_the_devices_are_idle(tmp_path):
    clock = Clock()
    goodput = goodput_of(tmp_path, clock)

    class Result:
        ready = True

        def is_ready(self):
            return self.ready

        def block_until_ready(self):
            return self

    def slow():
        for item in range(3):
            clock.passes(10)
            yield item

    result = Result()
    step = goodput.timed_steps(lambda halves: (None, result))
    goodput.begin_steps(0)
    waited = []
    for item in goodput.timed_batches(slow()):
        waited.append(goodput.seconds["data"])
        step("both")
        result.ready = item != 0  # busy with the first step while the second batch comes
    assert waited == [10, 10, 20]
