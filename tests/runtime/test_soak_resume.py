"""Killed at random moments, on one process: what is left is the uninterrupted run, bit for bit.

python -m pytest tests/runtime/test_soak_resume.py --soak -s     # 50 kills; a few otherwise
"""

import random

import pytest

from tests.helpers.kill_loop import Tally, assert_same_end, run_killed, run_to_end, spawn
from tests.training.test_loop import text  # noqa: F401 (a fixture)

STEPS = 400


def soak(text, folder, kills: int, seed: int, steps: int, longest: float, pace: float = 0.0) -> Tally:
    """Kills runs of `steps` steps, one after the other, until `kills` have hit; compares each with the whole run.

    pace: least seconds of a step of a run that is killed: it must not be at its end before the blow falls.
    """

    def trainer(workdir, pace=0.0):
        arguments = [
            f"--config=tests/helpers/soak_config.py:{steps}",
            f"--workdir={workdir}",
            f"--config.data.source={text}",
        ]
        return lambda: [spawn(arguments, folder / f"{workdir.name}.log", pace)]

    run_to_end(trainer(folder / "whole"))
    total, chooser = Tally(), random.Random(seed)
    for number in range(kills):
        workdir = folder / f"killed{number}"
        total.add(run_killed(trainer(workdir, pace), workdir, chooser, kills - total.strikes, longest=longest))
        assert_same_end(workdir, folder / "whole")
        if total.strikes == kills:
            break
    print(total)
    return total


def test_killed_while_a_step_is_saved_and_stopped_after_one(text, tmp_path):
    total = soak(text, tmp_path, kills=2, seed=182, steps=80, longest=0.5, pace=0.1)
    assert (total.kills, total.terms, total.saving) == (1, 1, 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_50_times(text, tmp_path):
    total = soak(text, tmp_path, kills=50, seed=0, steps=STEPS, longest=1.0)
    assert total.strikes == 50 and total.saving >= 5 and total.kills >= 10 and total.terms >= 10
