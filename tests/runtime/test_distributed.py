"""Runs of several processes: what each reads and writes, what ends them, and what another mesh goes on with."""

import json
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from llada_jax.checkpoint import saver
from llada_jax.checkpoint.weights import write_weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_preference import pack_preference
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.runtime import distributed, failure, global_arrays
from tests.helpers import kill_loop, small_trainer
from tests.helpers.kill_loop import metrics_of
from tests.helpers.processes import ROOT, codes, run, small_run, start, text
from tests.helpers.rl_inputs import write_rl_inputs

MESHES = {  # processes x devices of each: the sizes of the mesh
    (1, 4): dict(fsdp=4),
    (2, 2): dict(fsdp=2),
    (4, 2): dict(tensor=4),  # two processes have the same rows
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The data of runs, as arguments."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        sentence = f"document {i} says that the quick brown fox jumps over the lazy dog number {i}.\n"
        (folder / f"{i}.txt").write_text(sentence * (8 + i))
    return [f"--config.data.source={folder}"]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The workdir of a run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_on((2, 2), small, folder)
    return folder


def mesh_flags(sizes):
    return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


def wait_for_step(step, logs, running, seconds=300):
    """Kills the run when it does not get there."""
    end = time.monotonic() + seconds
    while not re.search(rf"^step {step}/", text(logs, 0, "out"), re.M):
        if time.monotonic() > end or any(process.poll() is not None for process in running):
            pytest.fail(f"not at step {step}; exit codes {codes(running, 1)}: {text(logs, 0, 'err')}")
        time.sleep(0.02)


def run_on(mesh, small, workdir):
    processes, devices = mesh
    logs = workdir.with_name(f"{workdir.name}.logs")
    arguments = [*small_run(), *small, f"--workdir={workdir}", *mesh_flags(MESHES[mesh])]
    found = run(arguments, logs, processes, devices)
    assert found == [0] * processes, "\n".join(text(logs, i, "err") for i in range(processes))
    return logs


def go_on(mesh, small, whole, at, workdir):
    """The rows of metrics after step `at` of a run that goes on from there on `mesh`."""
    shutil.copytree(whole, workdir)
    for step in saver.steps(whole / "checkpoints"):
        if step > at:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    assert f"resuming at step {at}" in text(run_on(mesh, small, workdir), 0, "out")
    return [row for row in metrics_of(workdir) if row["step"] > at]


def assert_same_training(found, expected):
    """The same batches and noise, bit for bit; losses, NELBO and gradients but for the order of sums."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    digests = [[(row["step"], row["digest_0"], row["digest_1"]) for row in rows if "loss" in row]
               for rows in (found, expected)]  # fmt: skip
    assert digests[0] == digests[1] and len(set(digests[0])) == len(digests[0]) > 1
    for name in ("loss", "nelbo", "gradient_norm"):
        ours, theirs = ([row[name] for row in rows if name in row] for rows in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)


def test_one_process_goes_on_where_two_were_and_only_the_first_of_them_wrote(small, whole, tmp_path):
    expected = [row for row in metrics_of(whole) if row["step"] > 8]
    assert_same_training(go_on((1, 4), small, whole, 8, tmp_path / "cut"), expected)
    logs = whole.with_name("whole.logs")
    assert "8 rows a step on data 2 x fsdp 2 of 2 processes" in text(logs, 0, "out")
    assert text(logs, 1, "out") == "" and len(list(whole.glob("events.*"))) == 1
    assert not list(whole.glob(".seen-*"))


@pytest.mark.soak
def test_every_mesh_goes_on_where_every_other_was(small, whole, tmp_path):
    runs = {mesh: tmp_path / f"whole-{mesh[0]}" for mesh in MESHES}
    for first, folder in runs.items():
        run_on(first, small, folder)
        assert_same_training(metrics_of(folder), metrics_of(whole))
        expected = [row for row in metrics_of(folder) if row["step"] > 8]
        for then in MESHES:
            assert_same_training(go_on(then, small, folder, 8, tmp_path / f"{first[0]}-then-{then[0]}"), expected)


def test_a_run_that_is_stopped_and_then_loses_a_process_ends_as_if_it_had_not(small, whole, tmp_path):
    arguments = [*small_run(), *small, *mesh_flags(MESHES[2, 2]), f"--workdir={tmp_path / 'run'}"]
    logs, again = tmp_path / "logs", tmp_path / "again"
    running = start(arguments, logs, PACE="2")
    wait_for_step(2, logs, running)
    running[1].send_signal(signal.SIGTERM)  # process 0 hears of it
    assert codes(running) == [0, 0], text(logs, 0, "err") + text(logs, 1, "err")
    (stopped,) = re.findall(r"^stopped at step (\d+)", text(logs, 0, "out"), re.M)
    assert saver.steps(tmp_path / "run" / "checkpoints")[-1] == int(stopped) < 14

    running = start([*arguments, "--peer_timeout=20"], again, PACE="2")
    wait_for_step(int(stopped) + 1, again, running)
    assert f"resuming at step {stopped}" in text(again, 0, "out")
    running[1].kill()
    assert codes(running) == [distributed.LOST_PEER, -signal.SIGKILL], text(again, 0, "err")
    said = r"^error: (process 1: no sign of life for 20 seconds|lost touch with another process).* the last checkpoint$"
    assert re.search(said, text(again, 0, "err"), re.M)

    assert run(arguments, tmp_path / "last") == [0, 0], text(tmp_path / "last", 0, "err")
    kill_loop.assert_same_end(tmp_path / "run", whole)


def test_an_error_of_one_process_ends_all(small, tmp_path):
    arguments = [*small_run(), *small, *mesh_flags(MESHES[2, 2]), f"--workdir={tmp_path / 'run'}"]
    assert run(arguments, tmp_path / "other", own={1: ["--config.seed=1"]}) == [2, 2]
    for process in (0, 1):
        message = "process 1 has another config, code or JAX than process 0\n"
        assert text(tmp_path / "other", process, "err").endswith(message)
    assert not (tmp_path / "run").exists()

    assert run(arguments, tmp_path / "corrupt", FAIL="1") == [2, 2]
    message = "rows.array_record: record 7 is corrupt\n"
    assert text(tmp_path / "corrupt", 1, "err").endswith(f"error: {message}")
    assert text(tmp_path / "corrupt", 0, "err").endswith(f"error: process 1: {message}")


def test_processes_that_do_not_come_are_waited_for_and_named(small, tmp_path):
    for i, missing in enumerate(((1,), (0,))):
        arguments = [*small_run(), *small, f"--workdir={tmp_path / 'run'}", "--start_timeout=4"]
        running = start(arguments, tmp_path / str(i), missing=missing)
        (there,) = {0, 1} - set(missing)
        assert codes(running) == [distributed.LOST_PEER]
        assert f"error: process {there} of 2: the others were not all at localhost:" in text(
            tmp_path / str(i), there, "err"
        )


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(coordinator="a:1"), "--processes and --process missing"),
        (dict(processes=2), "--coordinator and --process missing"),
        (dict(coordinator="a:1", processes=2, process=2), "--process=2, expected 0 to 1"),
        (dict(coordinator="a", processes=2, process=0), "--coordinator=a, expected HOST:PORT"),
        (dict(coordinator=":1", processes=2, process=0), "expected HOST:PORT"),
        (dict(peer_timeout=0), "--peer_timeout=0"),
        (dict(start_timeout=-1), "--start_timeout=-1"),
    ],
)
def test_bad_flags_are_named(values, message):
    given = dict(coordinator=None, processes=None, process=None, peer_timeout=10, start_timeout=10) | values
    with pytest.raises(InputError, match=message):
        distributed.connect(**given)


def test_one_process_without_flags_is_one_process():
    distributed.connect(None, None, None, peer_timeout=10, start_timeout=10)
    assert distributed.in_turn(lambda: 3) == 3
    with pytest.raises(InputError, match="as it was"), failure.failing_together(10):
        raise InputError("as it was")


def test_own_rows_are_those_of_the_process_each_once_and_ascending():
    class Sharding:  # devices 0 and 1 share rows, those of 2 come before
        def addressable_devices_indices_map(self, shape):
            assert shape == (12,)
            return dict(enumerate([(slice(8, 10),), (slice(8, 10),), (slice(2, 4),)]))

    np.testing.assert_array_equal(global_arrays.own_rows(Sharding(), 12), [2, 3, 8, 9])

    class Whole:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(None),)}

    np.testing.assert_array_equal(global_arrays.own_rows(Whole(), 3), [0, 1, 2])


def soak(small, folder, seeds, kills):
    """Runs of two processes, of which one or both are struck again and again, end as the one that was left alone."""
    arguments = [
        *small_run(34, save_every=4),
        *small,
        *mesh_flags(MESHES[2, 2]),
        "--peer_timeout=20",
        "--start_timeout=60",
    ]

    def starter(name):
        logs = folder / f"{name}.logs"
        return lambda: start([*arguments, f"--workdir={folder / name}"], logs)

    kill_loop.run_to_end(starter("whole"))
    tally = kill_loop.Tally()
    for seed in seeds:
        chooser, name = random.Random(seed), f"killed-{seed}"

        def victims(running, chooser=chooser):
            return chooser.choice([running[:1], running[1:], running])

        found = kill_loop.run_killed(starter(name), folder / name, chooser, kills - tally.strikes, victims)
        tally.add(found)
        kill_loop.assert_same_end(folder / name, folder / "whole")
        print(f"run {seed}: {found}; {tally.strikes} strikes so far", flush=True)
        if tally.strikes >= kills:
            break
    return tally


@pytest.mark.soak
def test_fifty_kills_of_two_processes_change_nothing(small, tmp_path):
    tally = soak(small, tmp_path, seeds=range(100, 200), kills=50)
    assert tally.strikes == 50 and tally.kills > 5 and tally.terms > 5 and tally.saving > 5, tally


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 2])
def test_dpo_of_two_processes_is_that_of_one(small, tmp_path, rank):
    """Process 0 keeps the reference's scores; with a rank, the base of the adapters is read shard by shard."""
    tokenizer = byte_tokenizer(eos_id=508, mask_id=511)
    pairs = [{"prompt": f"{i} plus 1 is", "chosen": f" {i + 1}.", "rejected": " 0, I think."} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pack_preference(str(tmp_path / "pairs.jsonl"), tokenizer, str(tmp_path / "rows"), 128, max_pairs=4)
    model = small_trainer.MODEL.replace(eos_token_id=508, mask_token_id=511)
    leaves = parameters.unstack(parameters.initialize(model, jax.random.key(0)), model)
    write_weights(tmp_path / "weights", model, leaves.items(), tokenizer.files, {})
    arguments = [
        f"--config={ROOT}/configs/dpo.py:tiny_hosts,length=128,steps=6", f"--config.init_from={tmp_path / 'weights'}",
        f"--config.data.path={tmp_path / 'rows'}", "--config.data.held_out_rows=4", "--config.batch.rows=8",
        "--config.preference.reference=precomputed", "--config.preference.max_pairs=4", f"--config.lora.rank={rank}",
        "--config.schedule.block_size=8", "--config.evaluation.block_sizes=(8,)", "--config.evaluation.every_steps=3",
        "--config.optimizer.learning_rate=3e-3", "--config.log_every_steps=1",
    ]  # fmt: skip
    for processes, devices in ((1, 4), (2, 2)):
        more = [*mesh_flags(MESHES[processes, devices]), f"--workdir={tmp_path / str(processes)}"]
        logs = tmp_path / f"logs-{processes}"
        found = run([*arguments, *more], logs, processes, devices)
        assert found == [0] * processes, "\n".join(text(logs, i, "err") for i in range(processes))
    one, two = ((tmp_path / str(processes) / "reference_scores.bin").read_bytes() for processes in (1, 2))
    assert len(one) == len(two)
    ours, theirs = metrics_of(tmp_path / "2"), metrics_of(tmp_path / "1")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for name in ("loss", "margin", "nelbo", "preference_margin"):
        values = [[row[name] for row in rows if name in row] for rows in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.soak
@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_reinforcement_learning_of_two_processes_is_that_of_one(tmp_path, estimator):
    """Each process decodes half of the answers, over its own four devices."""
    reward = "def early(question, answer):\n    return sum(letter < 'n' for letter in answer) / 12\n"
    write_rl_inputs(tmp_path, small_trainer.MODEL, reward)
    flags = [
        f"--config={ROOT}/configs/rl.py:init_from,length=32,steps=2",
        f"--config.init_from={tmp_path}/base",
        f"--config.rl.questions={tmp_path}/questions.jsonl",
        f"--config.rl.reward={tmp_path}/rewards.py:early",
        f"--config.rl.estimator={estimator}",
        "--config.rl.held_out=4",
        "--config.rl.reward_workers=1",
        "--config.rl.gen_length=12",
        "--config.rl.rows=8",
        "--config.rl.group=4",
        "--config.rl.copies=2",
        "--config.schedule.block_size=8",
        "--config.batch.rows=16",
        "--config.execution.dtype=float32",
        "--config.execution.remat=none",
        "--config.optimizer.learning_rate=3e-3",
        "--config.mesh.fsdp=4",
        "--config.mesh.data=2",
    ]
    found = {}
    for processes, devices in ((1, 8), (2, 4)):
        workdir = tmp_path / str(processes)
        logs = tmp_path / f"{processes}.logs"
        codes_found = run([*flags, f"--workdir={workdir}"], logs, processes, devices)
        assert codes_found == [0] * processes, "\n".join(text(logs, i, "err") for i in range(processes))
        found[processes] = metrics_of(workdir)
    assert len(found[1]) == 3 and found[1][0]["gradient_norm"] > 0
    for one, two in zip(found[1], found[2], strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if name not in ("drift", "drift_max") and isinstance(value, float):
                assert value == pytest.approx(two[name], rel=2e-3, abs=1e-5), (one["step"], name)
