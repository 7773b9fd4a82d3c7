"""The block size of every step."""

import pytest

from llada_jax.diffusion import schedule
from llada_jax.errors import InputError


def test_wsd_phases_in_order():
    phases = schedule.wsd(256, [(1, 2), (4, 3), (64, 1)], 4, [(128, 2), (32, 3)])
    sizes = [schedule.phase_at(phases, step).block_size for step in range(schedule.total_steps(phases))]
    assert sizes == [1] * 2 + [4] * 3 + [64] + [256] * 4 + [128] * 2 + [32] * 3
    halves = [schedule.phase_at(phases, step).halves for step in range(15)]
    assert halves == ["both"] * 6 + ["noisy"] * 4 + ["both"] * 5
    with pytest.raises(IndexError):
        schedule.phase_at(phases, 15)


def test_a_block_as_long_as_the_row_needs_no_clean_half():
    assert schedule.constant(64, 64, 1)[0].halves == "noisy"
    assert schedule.autoregressive(64, 1)[0].halves == "clean"


@pytest.mark.parametrize(
    "warmup,stable,decay,message",
    [
        ([(24, 1)], 1, [], "warmup block size 24 does not divide length 256"),
        ([], 1, [(100, 1)], "decay block size 100 does not divide length 256"),
        ([(0, 1)], 1, [], "block size 0"),
        ([], -1, [], "-1 steps"),
    ],
)
def test_bad_schedules_are_refused(warmup, stable, decay, message):
    with pytest.raises(InputError, match=message):
        schedule.wsd(256, warmup, stable, decay)
