"""The pieces of experiments/editing: its configs, the settings that are answered, the tables."""

import numpy as np
import pytest

from llada_jax.training.config import check, objective
from tests.helpers.experiments import load


@pytest.mark.parametrize("name", load("editing", "config").VARIANTS)
def test_every_variant_has_a_valid_config(name):
    config = load("editing", "config").get_config(name)
    config.init_from = "/some/run"
    check(config)
    base = load("post_training", "config").get_config("sft,tiny")
    assert config.schedule.steps == base.schedule.steps and config.optimizer == base.optimizer
    pair = 2 if config.objective.complementary else 1
    assert config.batch.rows * pair == 2 * base.batch.rows, "all train on as many positions"
    if name == "sft":
        assert config.objective == base.objective and objective(config) == objective(base)


def seed_of(score, edited):
    """Plain SFT scores `score` at each threshold; edits at 0 score `edited`."""
    plain = {"rule": "sglang", "active_blocks": 1}
    shown = load("editing", "report").THRESHOLDS
    sft = [plain | {"threshold": t, "score": s, "tokens_per_forward": 2.0} for t, s in zip(shown, score, strict=True)]
    edits = {"rule": "llada2.1", "editing_threshold": 0.0, "active_blocks": 1, "tokens_per_forward": 1.5}
    edited = [edits | {"threshold": t, "score": edited} for t in shown]
    return {"sft": sft + edited, "edit": edited}


def test_tables_take_what_is_won_back_within_a_seed():
    report = load("editing", "report")
    count = len(report.THRESHOLDS)
    found = [seed_of(np.linspace(0.2, 0.8, count), 0.7), seed_of(np.linspace(0.3, 0.9, count), 0.6)]
    at_half = 0.2 + 0.6 / (count - 1)
    share = [(0.7 - at_half) / (0.8 - at_half), (0.6 - at_half - 0.1) / (0.8 - at_half)]
    np.testing.assert_allclose(report.won_back(found, "edit", 0.5), share)
    lines = report.ablation_table(found).splitlines()
    assert f"{np.mean(share) * 100:.0f} ± " in lines[-1] and "65.0 ± 5.0; 1.50 ± 0.00" in lines[-1]
    assert "| 0.3 | 25.0 ± 5.0; 2.00 ± 0.00 |" in report.thresholds_table(found)


def test_each_variant_answers_each_setting_once():
    config, answers = load("editing", "config"), load("editing", "answers")
    for variant in config.VARIANTS.values():
        settings = answers.settings_of(variant)
        assert len({tuple(sorted(s.items())) for s in settings}) == len(settings)
        assert {s["active_blocks"] for s in settings} == set(variant.active)
