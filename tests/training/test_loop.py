"""Whole runs of the trainer on a very small model: resume bit for bit, preemption, stages, bad input."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llada_jax.checkpoint import merge, saver
from llada_jax.checkpoint.weights import load_checkpoint
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_chat import pack_chat
from llada_jax.data.pack_preference import pack_preference
from llada_jax.errors import InputError
from llada_jax.model.config import PRESETS, preset
from llada_jax.training import loop, stages
from llada_jax.training.config import default_config
from tests.helpers.environment import process_environment
from tests.helpers.kill_loop import metrics_of
from tests.helpers.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    """A model of 50 k parameters under a name that configs can use."""
    PRESETS["small"] = preset("tiny").replace(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16, intermediate_size=64
    )
    PRESETS["small_moe"] = preset("tiny_moe").replace(
        hidden_size=32, num_layers=2, num_dense_layers=0, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=8,
        moe_intermediate_size=16,
    )  # fmt: skip
    yield
    del PRESETS["small"], PRESETS["small_moe"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        sentence = f"document {i} says that the quick brown fox jumps over the lazy dog number {i}.\n"
        (folder / f"{i}.txt").write_text(sentence * (8 + i))
    return folder


def train(config, workdir, devices=1):
    loop.train(config, workdir, jax.devices()[:devices])
    return metrics_of(workdir)


def config_of(text, model="small", **changes):
    config = default_config(model)
    with config.unlocked():
        config.data.update(source=str(text), tokenizer="bytes", length=32, held_out_rows=4)
        config.batch.rows = 8
        config.schedule.update(
            warmup_blocks=(1, 4), warmup_steps=(3, 3), stable_steps=4, decay_blocks=(16, 8), decay_steps=(2, 2)
        )
        config.checkpoint.update(every_steps=4, keep_last=None)
        config.evaluation.update(every_steps=6, block_sizes=(1, 8, 32), rows=4)
        config.log_every_steps = 1
    for field, value in changes.items():
        node, name = config, field
        while "__" in name:
            head, name = name.split("__", 1)
            node = node[head]
        node[name] = value
    return config


def assert_same_checkpoint(a, b):
    a, b = json.loads((a / "digests.json").read_text()), json.loads((b / "digests.json").read_text())
    assert a["tensors"] == b["tensors"]


@pytest.mark.parametrize("model", ["small_moe", pytest.param("small", marks=pytest.mark.soak)])
def test_resumed_run_is_the_uninterrupted_one(text, tmp_path, model):
    config = config_of(text, model, objective__embedding_noise_std=0.1, objective__embedding_noise_steps=8)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    # Lose what came after step 8, as a kill between two saves does, and part of a line of metrics.
    for step in (12, 14):
        path = tmp_path / "cut" / "checkpoints" / str(step)
        path.rename(tmp_path / f"lost-{step}")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:
        f.write('{"step": 14, "lo')
    train(config, tmp_path / "cut")
    for step in (12, 14):
        assert_same_checkpoint(*(tmp_path / run / "checkpoints" / str(step) for run in ("whole", "cut")))
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    train(config, tmp_path / "cut")  # a run that is finished stays as it is
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


def test_best_steps_survive_and_a_resumed_run_keeps_the_same(text, tmp_path):
    changes = dict(checkpoint__every_steps=2, checkpoint__best_block_size=8, evaluation__every_steps=5)
    everything = config_of(text, **changes, checkpoint__keep_best=2)
    nelbos = [
        (row["nelbo"], row["step"])
        for row in train(everything, tmp_path / "all")
        if row.get("block_size") == 8 and "nelbo" in row
    ]
    assert [step for _, step in nelbos] == [2, 4, 5, 6, 8, 10, 12, 14]  # 5 is evaluated, not saved
    saved = sorted(pair for pair in nelbos if pair[1] != 5)
    best = merge.best_steps(tmp_path / "all", 2)
    assert [(float(nelbo), int(path.name)) for path, nelbo in best] == saved[:2]
    expected = sorted({step for _, step in saved[:2]} | {14})

    config = config_of(text, **changes, checkpoint__keep_best=2, checkpoint__keep_last=1)
    train(config, tmp_path / "whole")
    assert saver.steps(tmp_path / "whole" / "checkpoints") == expected
    shutil.copytree(tmp_path / "all", tmp_path / "cut")  # what a run killed before step 10 leaves
    for step in (2, 4, 6, 10, 12, 14):
        if step > 8 or (step not in expected and step != 2):
            shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    train(config, tmp_path / "cut")
    assert saver.steps(tmp_path / "cut" / "checkpoints") == expected
    assert merge.best_steps(tmp_path / "cut", 2)[0][1] == best[0][1]


def test_metrics_rows_and_compiled_programs(text, tmp_path):
    train(config_of(text), tmp_path)
    rows = metrics_of(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 15))
    assert [row["block_size"] for row in steps] == [1] * 3 + [4] * 3 + [32] * 4 + [16] * 2 + [8] * 2
    assert [row["phase"] for row in steps] == ["warmup"] * 6 + ["stable"] * 4 + ["decay"] * 4
    evaluations = [(row["step"], row["block_size"]) for row in rows if "nelbo" in row]
    assert evaluations == [(step, size) for step in (6, 12, 14) for size in (1, 8, 32)]
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "config.json").read_text())["schedule"]["stable_steps"] == 4


def test_loss_falls_and_a_stage_starts_from_the_one_before(text, tmp_path, capsys):
    ar = config_of(text, stage="ar", alignment="shifted", schedule__kind="ar", schedule__steps=60, log_every_steps=20)
    ar.optimizer.learning_rate = 1e-2
    train(ar, tmp_path / "ar")
    losses = [row["loss"] for row in metrics_of(tmp_path / "ar") if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    before = [row["nelbo"] for row in metrics_of(tmp_path / "ar") if "nelbo" in row][-1]

    wsd = config_of(text, init_from=str(tmp_path / "ar"))
    train(wsd, tmp_path / "wsd")
    model = load_checkpoint(tmp_path / "wsd")
    assert model.config.alignment == "shifted" and model.lineage["init_from"] == str(tmp_path / "ar")
    loaded = model.lineage["loaded"]
    assert loaded["path"] == str(tmp_path / "ar" / "checkpoints" / "60") and loaded["step"] == 60
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("init_from "))
    for part in (loaded["path"], "step 60 of stage ar", f"{loaded['parameters']:,} parameters", "alignment shifted"):
        assert part in printed
    assert printed.endswith(f"float32, weights {loaded['weights']}") and len(loaded["weights"]) == 12
    # Step 1 is at block size 1, where the imported model is the AR model.
    first = next(row for row in metrics_of(tmp_path / "wsd") if "loss" in row)
    assert first["masked_nll"] == pytest.approx(before, rel=0.25)


def test_sft_then_cap_then_dpo_from_packed_rows(tmp_path):
    """Each stage starts from the one before, on rows whose supervised tokens are the answers."""
    tokenizer = byte_tokenizer(eos_id=508, mask_id=511)
    chats, pairs, rows = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl", str(tmp_path / "rows")
    right = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}."} for i in range(60)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in right))
    both = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " 0, I think."} for row in right]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in both))
    pack_chat(str(chats), tokenizer, rows, 128, block_align=32)
    before = ""
    for stage in ("sft", "cap", "dpo"):
        config = stages.parse(stage, "tiny,length=128,steps=3")
        config.model = "small"
        config.init_from = before
        config.data.update(path=rows, source="", tokenizer="" if before else "bytes", held_out_rows=4)
        config.log_every_steps = 1
        config.batch.rows = 4
        if stage == "dpo":
            with pytest.raises(InputError, match="rows of --kind=chat, but config.preference.enabled=True"):
                train(config, tmp_path / "wrong_rows")
            config.data.path = str(tmp_path / "paired")
            pack_preference(str(pairs), tokenizer, config.data.path, 128, max_pairs=2)
            config.preference.draws = 2
        metrics = [row for row in train(config, tmp_path / stage) if "loss" in row]
        assert len(metrics) == 3
        before = str(tmp_path / stage)
    # Policy and reference are equal at first.
    assert "correct_entropy" not in metrics[0] and metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert metrics[2]["difference_variance"] > 0 and metrics[0]["learning_rate"] == pytest.approx(1e-6 * 10, rel=1e-3)
    config.preference.max_pairs = 1
    with pytest.raises(InputError, match="max_pairs=1: .* was packed with --max_pairs=2"):
        train(config, tmp_path / "too_many")
    config.preference.enabled = False
    with pytest.raises(InputError, match="rows of --kind=preference, but config.preference.enabled=False"):
        train(config, tmp_path / "no_preference")


def test_config_json_is_of_what_has_trained(text, tmp_path, capsys):
    """A finished run that is called again, and a refused one, leave it and all else as they were."""
    config = config_of(text, seed=3)
    config.schedule.update(kind="constant", block_size=8, steps=2)
    config.data.cache = str(tmp_path / "cache")

    def contents():
        files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        return {path: path.read_bytes() for path in files if path.name != "trainer.lock"}

    rows = train(config, tmp_path / "run")
    before = contents()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3
    changed = config.copy_and_resolve_references()
    changed.seed, changed.optimizer.learning_rate = 4, 0.5
    assert train(changed, tmp_path / "run") == rows and contents() == before
    changed.schedule.steps, changed.model = 4, "small_moe"
    with pytest.raises(InputError):
        train(changed, tmp_path / "run")
    assert contents() == before
    capsys.readouterr()
    config.schedule.steps = 3
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["schedule"]["steps"] == 3
    assert "config.schedule.steps was 2, is now 3" in capsys.readouterr().out


EDITS = dict(weight=0.5, replace_high=0.3, turns=2, draft_share=0.5, threshold_low=0.0, threshold_high=0.05)


@pytest.mark.parametrize("edits", [{}, EDITS])
def test_gradient_accumulation_is_exact(text, tmp_path, edits):
    runs = {}
    for micro_batches in (1, 4):
        config = config_of(text, objective__complementary=True, batch__micro_batches=micro_batches)
        config.editing.update(edits)
        config.objective.normalizer = "masked" if edits else "tokens"
        config.schedule.update(kind="constant", block_size=8, steps=4)
        runs[micro_batches] = [
            row.get("loss", row.get("nelbo")) for row in train(config, tmp_path / str(micro_batches))
        ]
    np.testing.assert_allclose(runs[1], runs[4], rtol=2e-4)


@pytest.mark.parametrize("model", ["small_moe", pytest.param("small", marks=pytest.mark.soak)])
@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=4), pytest.param(dict(data=8), marks=pytest.mark.soak)])
def test_a_mesh_agrees_with_one_device(text, tmp_path, model, sizes):
    one, other = (
        [row.get("loss", row.get("nelbo")) for row in train(config, tmp_path / name, devices)]
        for name, config, devices in (
            ("one", config_of(text, model), 1),
            ("mesh", config_of(text, model, **{f"mesh__{axis}": size for axis, size in sizes.items()}), 8),
        )
    )
    np.testing.assert_allclose(other, one, rtol=2e-4)


def test_fsdp_splits_weights_and_moments():
    from llada_jax import sharding
    from llada_jax.training import train_state
    from llada_jax.training.optimizer import make_optimizer

    config = default_config("tiny")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    optimizer = make_optimizer(config.optimizer, preset("tiny"), 10)
    shardings = train_state.shardings(train_state.abstract(preset("tiny"), optimizer), preset("tiny"), mesh)
    assert "fsdp" in str(shardings.params["dense"]["query"].spec)
    adam = next(s for s in jax.tree.leaves(shardings.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    assert adam.mu["dense"]["query"].spec == adam.nu["dense"]["query"].spec == shardings.params["dense"]["query"].spec


def test_sigterm_saves_and_a_second_run_goes_on(tmp_path):
    command = [
        sys.executable, "-m", "llada_jax.train", f"--config={ROOT}/configs/ar.py:tiny,length=64,steps=1000000",
        f"--workdir={tmp_path}", "--config.batch.rows=1", "--config.log_every_steps=1",
        "--config.evaluation.every_steps=1000000", "--config.checkpoint.every_steps=1000000",
    ]  # fmt: skip
    env = process_environment()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "stopped at step" in rest
    (step,) = (tmp_path / "checkpoints").iterdir()
    assert int(step.name) >= 3
    again = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any(f"resuming at step {step.name}" in line for line in again.stdout)
    again.kill()
    again.wait()
    again.stdout.close()


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(schedule__warmup_blocks=(1, 5)), "block size 5 does not divide length 32"),
        (dict(schedule__warmup_steps=(1,)), "warmup_steps has 1 entries"),
        (dict(schedule__kind="wds"), 'schedule.kind="?wds|schedule.kind=.wds.'),
        (dict(optimizer__learning_rate=-1.0), "optimizer.learning_rate=-1.0"),
        (dict(batch__micro_batches=3), "micro_batches=3 does not divide"),
        (dict(objective__rate_low=0.9, objective__rate_high=0.1), "rate_low"),
        (dict(objective__time_weight="1/t"), "time_weight"),
        (dict(evaluation__block_sizes=(3,)), "evaluation.block_sizes: 3"),
        (dict(checkpoint__best_block_size=16), "checkpoint.best_block_size=16, expected one of"),
        (dict(execution__attention="flash"), "attention='flash'"),
        (dict(data__source="/nowhere"), "/nowhere"),
        (dict(data__held_out_rows=100_000), "none is left"),
        (dict(init_from="/nowhere"), "/nowhere"),
        (
            dict(optimizer__learning_rate=None),
            'learning_rate=None is that of the stage before, but config.init_from=""',
        ),
        (dict(mesh__fsdp=3), "mesh"),
        (dict(schedule__kind="ar"), "alignment"),
        (dict(model="smollm2_135m", data__tokenizer="tokenizer"), "no mask token; import .* --add_mask_token"),
    ],
)
def test_bad_configs_name_the_field_and_write_nothing(text, tmp_path, changes, message):
    if changes.get("data__tokenizer") == "tokenizer":  # one without a mask token
        changes = changes | dict(data__tokenizer=str(tmp_path / "tokenizer"))
        (tmp_path / "tokenizer").mkdir()
        for name, content in byte_tokenizer(eos_id=256).files.items():
            (tmp_path / "tokenizer" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        train(config_of(text, data__cache=str(tmp_path / "cache"), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def run_command(*arguments):
    env = process_environment()
    command = [sys.executable, "-m", "llada_jax.train", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "--workdir"),
        (("--config=configs/wsd.py:tiny", "--config.optimizer.lr=1"), "lr"),
        (("--config=configs/wsd.py:huge",), "huge"),
        (("--config=configs/wsd.py:tiny,width=3",), "width"),
        (("--config=configs/none.py",), "none.py"),
        (("--config=configs/wsd.py:tiny", "--config.batch.rows=many"), "many"),
        (("--config=configs/wsd.py:tiny,length=100",), "block size 32 does not divide length 100"),
    ],
)
def test_bad_commands_end_in_one_line_and_exit_code_2(tmp_path, arguments, message):
    extra = (f"--workdir={tmp_path / 'run'}",) if arguments else ()
    done = run_command(*arguments, *extra)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_help():
    done = run_command("--help")
    assert done.returncode == 0 and "--workdir" in done.stdout and "configs/wsd.py:MODEL" in done.stdout
