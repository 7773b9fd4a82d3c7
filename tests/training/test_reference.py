"""DPO against scores that were made before training: the same run as against frozen weights, without a second model."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from llada_jax.checkpoint.score_file import ScoreFile
from llada_jax.checkpoint.weights import write_weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_preference import pack_preference
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.training import loop, reference
from llada_jax.training.config import default_config
from tests.training.test_loop import metrics_of, small_preset, train  # noqa: F401 (the fixture of the small model)

STEPS = 6


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with two checkpoints and rows of pairs."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = byte_tokenizer(eos_id=508, mask_id=511)
    rows = [{"prompt": f"{i} plus 1 is", "chosen": f" {i + 1}.", "rejected": " 0, I think."} for i in range(30)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_preference(str(folder / "pairs.jsonl"), tokenizer, str(folder / "rows"), 128, max_pairs=4)
    model = preset("small").replace(eos_token_id=508, mask_token_id=511)
    for seed in (0, 1):
        params = parameters.initialize(model, jax.random.key(seed))
        leaves = parameters.unstack(params, model)
        write_weights(folder / f"weights-{seed}", model, leaves.items(), tokenizer.files, {})
    return folder


def config_of(start, kind, **changes):
    config = default_config("small")
    config.init_from = str(start / "weights-0")
    config.data.update(path=str(start / "rows"), length=128, held_out_rows=4)
    config.batch.update(rows=4, micro_batches=2)
    config.schedule.update(kind="constant", block_size=8, steps=STEPS)
    config.objective.block_origin = "document"
    config.preference.update(enabled=True, reference=kind, draws=2, max_pairs=4)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=0)
    config.checkpoint.update(every_steps=3, keep_last=None)
    config.evaluation.update(every_steps=3, block_sizes=(8,), rows=4, preference_draws=2)
    config.log_every_steps = 1
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, {kind: train(config_of(start, kind), folder / kind) for kind in ("frozen", "precomputed")}


def test_precomputed_and_frozen_runs_are_one_run(runs):
    frozen, precomputed = runs[1]["frozen"], runs[1]["precomputed"]
    assert [row.keys() for row in frozen] == [row.keys() for row in precomputed]
    losses = [row for row in precomputed if "loss" in row]
    assert len(losses) == STEPS and losses[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert max(abs(row["margin"]) for row in losses) > 0.01  # the policy has moved
    for a, b in zip(frozen, precomputed, strict=True):
        for name in a.keys() & {"loss", "margin", "gradient_norm", "nelbo", "preference_margin", "preference_variance"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), (a["step"], name)


def test_held_out_pairs_are_compared_at_every_evaluation(runs):
    rows = [row for row in runs[1]["precomputed"] if "preference_pairs" in row]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        assert row["preference_pairs"] == 8 and 0 <= row["preference_accuracy"] <= 1
        assert row["preference_margin_stderr"] > 0 and row["preference_variance"] > 0


def test_a_resumed_run_loads_no_second_model(start, runs, tmp_path, monkeypatch):
    workdir = tmp_path / "cut"
    shutil.copytree(runs[0] / "precomputed", workdir)
    (workdir / "checkpoints" / "6").rename(tmp_path / "lost")
    monkeypatch.setattr(reference, "frozen_params", None)
    assert train(config_of(start, "precomputed"), workdir) == runs[1]["precomputed"]


def test_scoring_goes_on_where_it_was_killed(start, runs, tmp_path, capsys):
    whole = runs[0] / "precomputed" / "reference_scores.bin"
    data = whole.read_bytes()
    tmp_path.joinpath("reference_scores.bin").write_bytes(data[: -(len(data) // 4)])
    assert train(config_of(start, "precomputed"), tmp_path) == runs[1]["precomputed"]
    assert (tmp_path / "reference_scores.bin").read_bytes() == data
    out = capsys.readouterr().out
    assert f" of {STEPS} steps by the reference" in out and f"scoring {STEPS} " not in out


def test_sigterm_stops_the_scoring_and_keeps_what_is_scored(start, runs, tmp_path, monkeypatch, capsys):
    append = ScoreFile.append

    def kill_after_two(self, values):
        append(self, values)
        if self.stored == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ScoreFile, "append", kill_after_two)
    loop.train(config_of(start, "precomputed"), tmp_path, jax.devices()[:1])
    assert "stopped after scoring 2 steps" in capsys.readouterr().out and not (tmp_path / "checkpoints").exists()
    data = (runs[0] / "precomputed" / "reference_scores.bin").read_bytes()
    stored = (tmp_path / "reference_scores.bin").read_bytes()
    assert data.startswith(stored) and len(data) - len(stored) == (STEPS - 2) * (4 * 4 * 2 * 4 + 4)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"seed": 1}, "config.seed=0, this run has 1"),
        ({"preference.draws": 1}, "config.preference.draws=2"),
        ({"objective.rate_low": 0.5}, "config.objective.rate_low=0.001"),
        ({"schedule.steps": 7}, "schedule="),
        ({"init_from": "weights-1"}, "weights of config.init_from="),
        ({"evaluation.preference_draws": 3}, "held_out.bin: scored with config.evaluation.preference_draws=2"),
    ],
)
def test_stale_scores_are_refused(start, runs, changes, message):
    changes = {name: str(start / value) if name == "init_from" else value for name, value in changes.items()}
    with pytest.raises(InputError, match=message):
        train(config_of(start, "precomputed", **changes), runs[0] / "precomputed")
    assert metrics_of(runs[0] / "precomputed") == runs[1]["precomputed"]


def test_scores_made_before_editing_and_groups_stay_valid(runs):
    """A run of DPO has neither (training.config.check), so that files without these fields say as much."""
    with open(runs[0] / "precomputed" / "reference_scores.bin", "rb") as file:
        names = json.loads(file.readline())["depends_on"]
    assert "config.seed" in names and not [name for name in names if "editing" in name or "group_blocks" in name]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"yarn_factor": 4.0}, "model.rope_scaling=None, this run has {'kind': 'yarn', "),
        ({"alignment": "shifted"}, "model.alignment=None, this run has 'shifted'"),
        ({"execution.dtype": "bfloat16"}, "config.execution.dtype='float32', this run has 'bfloat16'"),
        ({"data.held_out_rows": 5}, "config.data.held_out_rows=4, this run has 5"),
    ],
)
def test_scores_of_another_reference_are_made_anew_before_the_first_step_is_saved(
    start, tmp_path, monkeypatch, capsys, changes, message
):
    class Scored(Exception):
        pass

    def scored(*arguments):
        raise Scored

    monkeypatch.setattr(loop, "_restore", scored)
    for each in ({}, changes, changes, {"optimizer.learning_rate": 1.0, "batch.micro_batches": 1, **changes}):
        with pytest.raises(Scored):
            train(
                config_of(start, "precomputed", **{"schedule.steps": 2, "evaluation.preference_draws": 1} | each),
                tmp_path,
            )
    said = capsys.readouterr().out
    assert (
        said.count("scoring 2 of 2 steps") == said.count(f"scored with {message}") / 2 + 1 == 2
    )  # and the held-out ones


def test_a_frozen_run_does_not_resume_against_another_reference(start, runs):
    changed = config_of(start, "frozen", init_from=str(start / "weights-1"))
    with pytest.raises(InputError, match="its weights are .* but the reference of .* is"):
        train(changed, runs[0] / "frozen")


def test_unknown_kinds_are_refused(start, tmp_path):
    with pytest.raises(InputError, match='preference.reference=.live., expected "frozen" or "precomputed"'):
        train(config_of(start, "live"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
