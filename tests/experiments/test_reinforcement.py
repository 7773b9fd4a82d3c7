"""The pieces of experiments/reinforcement: its configs, and its table."""

import pytest

from llada_jax.errors import InputError
from llada_jax.training.config import check
from tests.helpers.experiments import load


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_both_estimators_have_valid_configs_of_as_many_answers(estimator):
    config = load("reinforcement", "config").get_config(estimator)
    config.init_from = "/some/run"
    check(config)
    other = load("reinforcement", "config").get_config("elbo")
    assert config.batch == other.batch and config.schedule == other.schedule and config.rl.group == other.rl.group
    with pytest.raises(InputError, match="'ppo', expected one of elbo, trajectory"):
        load("reinforcement", "config").get_config("ppo")


def answered(score: float, **more) -> dict:
    return {"score": score, "score_stderr": 0.01, "tokens_per_forward": 1.5, "tokens_per_forward_stderr": 0.02} | more


def test_changes_are_taken_within_a_seed():
    report = load("reinforcement", "report")
    found = [
        {"sft": answered(0.6), "sft_elbo": answered(0.7, minutes=20)},
        {"sft": answered(0.8), "sft_elbo": answered(0.9, minutes=30)},
    ]
    lines = report.table(found).splitlines()
    assert "| SFT, then by the ELBO | 2 | 80.0 ± 10.0 | 10.0 ± 0.0 | 1.50 ± 0.00 | 25 ± 5 |" in lines
    assert "| SFT | 1 | 60.0 (± 1.0) |  | 1.50 (± 0.02) |  |" in report.table(found[:1])
