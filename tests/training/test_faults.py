"""Runs that meet a bad step: what stop, skip and rewind leave, and that a killed run decides as the whole one."""

import json
import shutil
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.checkpoint import saver
from llada_jax.data.mixture import Mixture
from llada_jax.data.order import Order
from llada_jax.data.rows import Row
from llada_jax.errors import InputError
from llada_jax.training import loop, supervised
from llada_jax.training.config import default_config, phases
from llada_jax.training.faults import FILE, FaultPolicy
from llada_jax.training.inputs import open_inputs
from llada_jax.training.step import Loss
from tests.training.test_loop import (  # noqa: F401 (fixtures)
    assert_same_checkpoint,
    config_of,
    metrics_of,
    small_preset,
    text,
    train,
)

ROWS, STEPS = 4, 12


def faulty_config(text, **changes):
    config = config_of(text, **changes)
    config.schedule.update(kind="constant", block_size=4, steps=STEPS)
    config.objective.time_weight = "uniform"  # losses close to each other
    config.optimizer.update(warmup_steps=2, decay_steps=2)
    config.batch.rows = ROWS
    config.checkpoint.every_steps = 4
    config.evaluation.update(every_steps=STEPS, block_sizes=(4,))
    return config


@pytest.fixture
def bad_rows(text, clean, monkeypatch):
    """(rows of step 7, whose loss is not a number; rows of step 10, whose loss is a hundred times what it was)"""
    rows = [rows_of_step(faulty_config(text), clean, step) for step in (6, 9)]
    real = supervised.train_loss
    ids, values = np.array([step[0] for step in rows], np.uint32), np.array([np.nan, 100], np.float32)

    def train_loss(*arguments):
        inner = real(*arguments)

        def prepare(batch, block_size, halves):
            met = batch.row_ids[:, None] == ids[None]
            factor = jnp.prod(jnp.where(met, values[None], np.float32(1)))
            return inner.prepare(batch, block_size, halves), factor

        def value(params, reference, example, total, noise_std, halves):
            loss, sums = inner.value(params, reference, example[0], total, noise_std, halves)
            return loss * example[1], (sums, example[1])

        def metrics(sums, total):
            named = inner.metrics(sums[0], total)
            return named | {"loss": named["loss"] * sums[1]}

        return Loss(prepare, lambda example: inner.total(example[0]), value, metrics)

    monkeypatch.setattr(supervised, "train_loss", train_loss)
    return rows


def rows_of_step(config, folder, step, offset=0):
    return open_inputs(config, folder).rows.batch(step, ROWS, offset).row_ids.tolist()


@pytest.fixture(scope="module")
def clean(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    train(faulty_config(text), folder)
    return folder


def faults_of(workdir):
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def host_of(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "train_state.json").read_text())["host"]


def forget(workdir, *steps):
    for step in steps:
        shutil.rmtree(workdir / "checkpoints" / str(step))


@pytest.mark.parametrize("log_every", [1, 100])
def test_stop_ends_before_the_state_is_saved(text, bad_rows, tmp_path, log_every):
    """Step 7 would be saved, and its loss is not a number; whether it is shown does not matter."""
    config = faulty_config(text, log_every_steps=log_every)
    config.checkpoint.every_steps = 7 if log_every == 1 else 3  # or step 6 is
    with pytest.raises(InputError, match="step 7: the loss is nan; lower optimizer.learning_rate"):
        train(config, tmp_path)
    assert saver.steps(tmp_path / "checkpoints") == ([] if log_every == 1 else [3, 6])
    (fault,) = faults_of(tmp_path)
    assert fault["row_ids"] == bad_rows[0] and (fault["step"], fault["action"], fault["loss"]) == (7, "stop", None)


def test_skip_leaves_weights_and_optimizer_as_they_were(text, clean, bad_rows, tmp_path):
    """After a loss that is not a number, and after a spike."""
    config = faulty_config(
        text, faults__on_nonfinite="skip", faults__on_spike="skip", faults__spike_factor=5.0, faults__spike_window=3
    )
    config.checkpoint.every_steps = 1
    rows = [row for row in train(config, tmp_path) if "loss" in row]
    saved = [tmp_path / "checkpoints" / str(step) for step in range(STEPS + 1)]
    for before, after in ((6, 7), (9, 10)):
        assert_same_checkpoint(saved[before], saved[after])
    with pytest.raises(AssertionError):
        assert_same_checkpoint(saved[7], saved[8])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["loss"] is None] == [7]
    expected = [row["loss"] for row in metrics_of(clean) if "loss" in row][:6]
    np.testing.assert_allclose([row["loss"] for row in rows[:6]], expected, rtol=1e-6)  # another program may round
    host = host_of(tmp_path, STEPS)
    assert host["step"] == STEPS and host["data_offset"] == 0 and host["faults"]["skipped"] == 2
    assert len(host["faults"]["losses"]) == 4 and all(loss < 20 for _, loss in host["faults"]["losses"])
    faults = faults_of(tmp_path)
    assert [(fault["step"], fault["action"], fault["row_ids"]) for fault in faults] == [
        (7, "skip", bad_rows[0]), (10, "skip", bad_rows[1]),
    ]  # fmt: skip
    assert faults[0]["loss"] is None and faults[1]["loss"] > 100


def test_rewind_moves_the_data_on_and_so_does_a_resumed_run(text, clean, bad_rows, tmp_path, monkeypatch):
    config = faulty_config(text, faults__on_nonfinite="rewind", log_every_steps=5)
    met, real = [], supervised.prefetch

    def recording(*arguments):
        for step, batch in real(*arguments):
            met.append((step, batch.row_ids.tolist()))
            yield step, batch

    monkeypatch.setattr(supervised, "prefetch", recording)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, whole)
    # Steps 1 to 8 (the bad seventh is found while the eighth runs), then from step 4 on with the rows behind the bad.
    assert [step for step, _ in met] == [*range(8), *range(4, STEPS)]
    assert [rows for _, rows in met[8:]] == [rows_of_step(config, clean, step + 3) for step in range(4, STEPS)]
    assert host_of(whole, 4)["data_offset"] == 0 and host_of(whole, STEPS)["data_offset"] == 3 * ROWS
    assert host_of(whole, STEPS)["faults"]["rewinds"] == 1
    (fault,) = faults_of(whole)
    assert (fault["step"], fault["action"], fault["row_ids"]) == (7, "rewind", bad_rows[0])
    assert [row["step"] for row in metrics_of(whole) if "loss" in row] == [1, 5, 10, STEPS]

    shutil.copytree(whole, cut)
    for lost in ((12,), (8, 12)):  # behind the rewind; before it, which then happens again
        forget(cut, *lost)
        train(config, cut)
        assert_same_checkpoint(*(run / "checkpoints" / str(STEPS) for run in (whole, cut)))
        assert metrics_of(cut) == metrics_of(whole) and faults_of(cut) == [fault]
        assert host_of(cut, STEPS) == host_of(whole, STEPS)


def test_rewind_without_a_checkpoint_begins_anew_and_has_a_budget(text, bad_rows, tmp_path):
    config = faulty_config(text, faults__on_nonfinite="rewind", faults__max_rewinds=1)
    config.checkpoint.every_steps = 100
    train(config, tmp_path / "anew")
    assert host_of(tmp_path / "anew", STEPS)["data_offset"] == 7 * ROWS
    config.faults.max_rewinds = 0
    with pytest.raises(InputError, match=r"step 7: the loss is nan, after config.faults.max_rewinds=0 others"):
        train(config, tmp_path / "stopped")
    assert [fault["action"] for fault in faults_of(tmp_path / "stopped")] == ["rewind"]


def policy_of(config, tmp_path, host=None):
    return FaultPolicy(config, phases(config), tmp_path, host or {})


def test_verdicts_do_not_depend_on_when_metrics_are_read_or_where_a_run_was_resumed(text, tmp_path):
    config = config_of(text, faults__on_spike="skip", faults__spike_factor=1.5, faults__spike_window=4)
    config.schedule.update(warmup_blocks=(1, 4), warmup_steps=(40, 40), stable_steps=0, decay_blocks=(), decay_steps=())
    rng = np.random.default_rng(0)
    losses = np.exp(rng.normal(0, 0.3, 80)).astype(np.float32)

    def limits(nows, resume_at):
        policy, limits = policy_of(config, tmp_path), []
        for step, loss in enumerate(losses):
            if step in resume_at:  # all was judged before it was saved
                assert not policy._pending
                policy = policy_of(config, tmp_path, json.loads(json.dumps(policy.host_state())))
            limits.append(float(policy.scalars(step)[0]))
            now = nows[step] or step + 1 in resume_at
            policy.observe(step, {"loss": loss, "gradient_norm": np.float32(1)}, np.arange(2), now)
        return limits, policy.skipped

    whole = limits([False] * 80, ())
    assert np.isinf(whole[0][:5]).all() and np.isinf(whole[0][40:45]).all()  # a phase begins without a level
    assert np.isfinite(whole[0][5:40]).any() and 5 < whole[1] < 40
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert limits(rng.random(80) < 0.3, set(rng.integers(1, 80, 6).tolist()))[0] == whole[0]


def test_the_level_is_the_median_of_the_phase(text, tmp_path):
    config = faulty_config(text, faults__on_spike="skip", faults__spike_factor=3.0, faults__spike_window=3)
    policy = policy_of(config, tmp_path)
    for step, loss in enumerate((1.0, 2.0, 1.5, 100.0, 9.0)):
        policy.observe(step, {"loss": np.float32(loss), "gradient_norm": np.float32(1)}, np.arange(1), True)
    assert policy.scalars(4) == (np.float32(4.5),)  # of steps 0 to 2; step 3 may still run
    assert policy.skipped == 1
    for remedy in ("rewind", "stop"):
        config.faults.on_spike = remedy
        policy = policy_of(config, tmp_path, policy.host_state())
        assert policy.scalars(5) == ()  # the step is not guarded
        bad = 5, {"loss": np.float32(9), "gradient_norm": np.float32(1)}, np.arange(1), True
        if remedy == "rewind":
            assert policy.observe(*bad) == 5
        else:
            with pytest.raises(InputError, match="step 6: the loss is 9, its level 2;"):
                policy.observe(*bad)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(faults__on_nonfinite="ignore"), 'faults.on_nonfinite=\'ignore\', expected "stop", "skip" or "rewind"'),
        (dict(faults__on_spike="no"), "faults.on_spike='no'"),
        (dict(faults__spike_factor=0.5), "faults.spike_factor=0.5, expected more than 1, or None"),
        (dict(faults__spike_window=0), "faults.spike_window=0"),
        (dict(faults__hang_minutes=-1.0), "faults.hang_minutes=-1.0"),
        (dict(checkpoint__keep_every=-1), "checkpoint.keep_every=-1"),
        (dict(checkpoint__every_minutes=-0.5), "checkpoint.every_minutes=-0.5"),
        (
            dict(faults__on_spike="rewind", preference__enabled=True, preference__reference="precomputed"),
            'faults.on_spike="rewind": precomputed scores are of the rows of each step',
        ),
    ],
)
def test_bad_policies_are_named(text, tmp_path, changes, message):
    changes = changes | ({"init_from": "x"} if "preference__enabled" in changes else {})
    with pytest.raises(InputError) as caught:
        train(faulty_config(text, **changes), tmp_path / "run")
    assert message in str(caught.value) and not (tmp_path / "run").exists()


class Counting(Order):
    """Rows 0, 1, ... of `count`; each epoch is one pass."""

    def __init__(self, count):
        self.count, self.stored, self.length, self.digest = count, count, 1, ""

    def __len__(self):
        return self.count

    def index(self, n):
        assert n >= 0
        return n % self.count, n // self.count

    def read(self, row_id):
        return Row(np.zeros(1, np.int32), np.ones(1, np.int32), np.ones(1, bool), ())


def policy_with(rows, host, tmp_path, steps=400):
    config = default_config("tiny")
    config.batch.rows = rows
    config.schedule.update(kind="constant", steps=steps)
    return FaultPolicy(config, phases(config), tmp_path, host)


@pytest.mark.parametrize("sizes", [(8, 4, 16, 8), (16, 2), (3, 50, 1), (6, 6)])
def test_a_run_that_goes_on_with_other_rows_meets_each_once_an_epoch(tmp_path, sizes):
    """Up and down, over the ends of epochs, of one dataset and of a mixture."""
    mixed = Mixture([Counting(40), Counting(30)], [Fraction(4, 7), Fraction(3, 7)])
    for order in (Counting(70), mixed):
        met, host, step = [], {}, 0
        for rows in sizes:
            policy = policy_with(rows, host, tmp_path)
            for _ in range(11):
                batch = order.batch(step, rows, policy.data_offset)
                met += zip(batch.row_ids.tolist(), batch.epochs.tolist(), strict=True)
                step += 1
            host = {"step": step} | policy.host_state()
        assert met == [(int(row), epoch) for row, epoch in map(order.index, range(len(met)))]


def test_a_rewind_and_then_other_rows(tmp_path):
    """Steps 0 to 5 of 8 rows, 4 saved; 5 is bad; then a resumed run of 4 rows, killed, and one of 16."""
    host = {"step": 4} | policy_with(8, {}, tmp_path).host_state()
    host = policy_with(8, host, tmp_path).rewound(5, 4, host)
    assert host["data_offset"] + 4 * 8 == 6 * 8  # behind step 5
    moved = policy_with(8, host, tmp_path)
    host = {"step": 7} | moved.host_state()
    fewer = policy_with(4, host, tmp_path)
    assert fewer.data_offset + 7 * 4 == moved.data_offset + 7 * 8
    host = {"step": 9} | fewer.host_state()
    more = policy_with(16, host, tmp_path)
    assert more.data_offset + 9 * 16 == fewer.data_offset + 9 * 4
    # A rewind after the change, to a step that had the rows of before.
    back = policy_with(16, host, tmp_path).rewound(10, 7, {"step": 7} | moved.host_state())
    assert policy_with(16, back, tmp_path).data_offset + 7 * 16 == more.data_offset + 11 * 16


def test_a_trained_run_goes_on_behind_its_rows(text, tmp_path, monkeypatch):
    """Checkpoints from before rows_per_step was kept say it by their config."""
    met, real = {}, Order.batch

    def batch(self, step, rows_per_step, offset=0, which=slice(None)):
        batch = real(self, step, rows_per_step, offset, which)
        if not isinstance(which, slice):  # of training, not of what is held out
            met[step] = list(zip(batch.row_ids.tolist(), batch.epochs.tolist(), strict=True))
        return batch

    monkeypatch.setattr(Order, "batch", batch)
    config = faulty_config(text)
    config.schedule.steps = 4
    train(config, tmp_path)
    path = tmp_path / "checkpoints" / "4" / "train_state.json"
    assert json.loads(path.read_text())["host"]["rows_per_step"] == ROWS
    for rows, steps in ((2, 6), (8, 7)):
        config.batch.rows, config.schedule.steps = rows, steps
        train(config, tmp_path)
    order = open_inputs(config, tmp_path).rows
    used = [pair for step in sorted(met) for pair in met[step]]
    assert len(used) == 4 * ROWS + 2 * 2 + 8 and used == [order.index(n) for n in range(len(used))]


def test_an_older_checkpoint_says_its_rows_by_its_config(text, tmp_path, monkeypatch):
    config = faulty_config(text)
    config.schedule.steps = 4
    train(config, tmp_path)
    restored = saver.restore

    def older(*arguments):
        *state, host = restored(*arguments)
        return *state, {name: value for name, value in host.items() if name != "rows_per_step"}

    monkeypatch.setattr(saver, "restore", older)
    seen = []

    def policy(config, phases, workdir, host):
        seen.append(host)
        return FaultPolicy(config, phases, workdir, host)

    monkeypatch.setattr(loop, "FaultPolicy", policy)
    config.batch.rows, config.schedule.steps = 2, 5
    train(config, tmp_path)
    assert seen[0]["rows_per_step"] == ROWS and host_of(tmp_path, 5)["data_offset"] == 4 * ROWS - 4 * 2
