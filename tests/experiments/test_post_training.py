"""The pieces of experiments/post_training: data, pairs, configs, the table."""

import json

import pytest

from llada_jax.tokenizer import load_tokenizer
from llada_jax.training.config import check
from tests.helpers import experiments


def load(name):
    return experiments.load("post_training", name)


def test_data_keeps_the_test_out_and_numbers_apart(tmp_path, monkeypatch):
    task = load("task")
    monkeypatch.setattr(task, "SIZES", {"text": 300, "chats": 50, "questions": 20})
    task.main(str(tmp_path), "3")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert len(rows) == 50
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size) == (508, 511, 512)
    text = tokenizer.apply_chat_template(rows[0]["messages"], add_generation_prompt=False)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text and not any("'" in piece and len(piece) > len("'0', ") for piece in pieces)
    # Make the test the first questions of the data: they must then be gone.
    monkeypatch.setattr(task, "TEST_SEED", 3 * 370)
    monkeypatch.setattr(task, "TEST_SIZE", 320)
    task.main(str(tmp_path), "3")
    left = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(left) == 50, "only the questions that are not of the test"


@pytest.mark.parametrize("model", load("config").MODELS)
@pytest.mark.parametrize("stage", load("config").STAGES)
def test_every_stage_has_a_valid_config(stage, model):
    config = load("config").get_config(f"{stage},{model}")
    config.init_from = "/some/run"  # DPO insists
    check(config)


def test_single_masks_process_as_many_positions_as_complementary_pairs():
    sft, single = (load("config").get_config(stage) for stage in ("sft", "sft_single"))
    assert sft.objective.complementary and not single.objective.complementary
    assert single.batch.rows == 2 * sft.batch.rows and single.schedule == sft.schedule


def test_pairs_are_the_wrong_answers_only():
    rows = [
        {"messages": ["q"], "solution": "['1']", "answer": "['1']"},
        {"messages": ["q"], "solution": "['1']", "answer": "['2'] "},
        {"messages": ["q"], "solution": "['1']", "answer": ""},
    ]
    assert list(load("pairs").pairs(rows)) == [{"prompt": ["q"], "chosen": "['1']", "rejected": "['2']"}]


def test_the_table_takes_ratios_within_a_seed():
    report = load("report")

    def seed(factor):
        stage = {"score": 0.5, "tokens_per_forward": 2.0 * factor, "held_out_nelbo": 1.0}
        stages = {name: dict(stage) for name in report.STAGES}
        stages["cap"]["tokens_per_forward"] *= 1.5
        return {"stages": stages, "preference": {"preference_accuracy": 0.75}, "minutes": 10}

    table = report.table([seed(1.0), seed(3.0)])
    assert "1.50 ± 0.00 times the tokens per forward, 0.0 ± 0.0 points" in table
    assert "| CAP | 50.0 ± 0.0 | 6.00 ± 3.00 |" in table and "DPO: 75.0 ± 0.0 %" in table
