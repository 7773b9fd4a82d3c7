"""The model of a run: a preset, or whatever the checkpoint holds that the run starts from."""

import json

import jax
import numpy as np
import pytest

from llada_jax.checkpoint import weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_chat import pack_chat
from llada_jax.data.pack_preference import pack_preference
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import RopeScaling, preset
from llada_jax.pod import lower
from llada_jax.training import loop, run_model, stages
from llada_jax.training.config import check, default_config, extended
from llada_jax.training.sections import FROM_CHECKPOINT

SHAPE = dict(hidden_size=24, num_heads=3, num_kv_heads=1, head_dim=8, rotary_dim=8, intermediate_size=40)
QWEN = preset("tiny").replace(architecture="qwen3", qk_norm=True, num_layers=1, max_position_embeddings=48, **SHAPE)
SPARSE = preset("tiny_moe").replace(num_layers=2, moe_intermediate_size=16, **SHAPE | dict(rotary_dim=4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints that are no preset's, and rows for them."""
    root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    tokenizer = byte_tokenizer(508, 511)
    for name, model in (("qwen", QWEN), ("sparse", SPARSE)):
        shapes = {name: leaf.shape for name, (leaf, _) in parameters.leaves(model).items()}
        drawn = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
        weights.write_weights(root / name, model, drawn.items(), tokenizer.files, {"source": "drawn"})
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}."} for i in range(40)]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_chat(str(root / "chats.jsonl"), tokenizer, str(root / "chats"), 64)
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " 0, I think."} for row in rows]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pack_preference(str(root / "pairs.jsonl"), tokenizer, str(root / "pairs"), 64, max_pairs=2)
    return root


def config_of(folders, stage, model="qwen", argument="init_from,length=64,steps=1"):
    config = stages.parse(stage, argument)
    config.init_from = str(folders / model)
    config.data.path = str(folders / ("pairs" if stage == "dpo" else "chats"))
    config.data.held_out_rows, config.evaluation.rows, config.batch.rows = 2, 1, 2
    config.execution.dtype, config.execution.remat = "float32", "none"
    config.optimizer.learning_rate = 1e-3
    return config


def losses_of(config, workdir):
    loop.train(config, str(workdir), jax.devices()[:1])
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_stages_train_a_checkpoint_of_any_size(folders, tmp_path, stage, capsys):
    config = config_of(folders, "sft" if stage == "lora" else stage)
    if stage == "lora":
        config.lora.rank = 2
    (loss,) = losses_of(config, tmp_path)
    assert loss > 0 and (stage != "dpo" or loss == pytest.approx(np.log(2), abs=1e-4))
    printed = capsys.readouterr().out
    assert f"qwen3 of init_from: {parameters.count(QWEN):,} parameters" in printed
    assert (
        "config.data.length=64: the model has seen 48 positions (max_position_embeddings); config.yarn_factor=2"
        in printed
    )
    saved = json.loads((tmp_path / "checkpoints" / "1" / "config.json").read_text())
    assert saved["model"]["hidden_size"] == 24 and saved["model"]["architecture"] == "qwen3"
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["lora"]["targets"] == list(parameters.adaptable(QWEN)) and written["mesh"]["fsdp"] == 1


def test_what_follows_from_the_model(folders):
    """A mixture of experts is split over the chips as its preset would be; what was set stays."""
    config = config_of(folders, "sft", "sparse")
    config.execution.remat = "full"
    fitted = run_model.fitted(config)
    assert (fitted.mesh.data, fitted.mesh.fsdp, fitted.execution.remat) == (1, -1, "hidden")
    assert fitted.lora.targets == parameters.adaptable(SPARSE) and config.mesh.fsdp == 0
    preset_config = stages.sft("llada2_mini")
    assert (preset_config.mesh.data, preset_config.mesh.fsdp, preset_config.execution.remat) == (1, -1, "hidden")
    config.mesh.fsdp, config.mesh.data, config.lora.targets = 2, 4, ("query",)
    fitted = run_model.fitted(config)
    assert (fitted.mesh.data, fitted.mesh.fsdp, fitted.lora.targets) == (4, 2, ("query",))
    assert run_model.fitted(preset_config) is preset_config
    dense = run_model.fitted(config_of(folders, "sft"))
    assert (dense.mesh.data, dense.mesh.fsdp, dense.execution.remat) == (-1, 1, "none")


@pytest.mark.parametrize("name", FROM_CHECKPOINT)
def test_names_of_no_preset(folders, name):
    config = config_of(folders, "sft", argument=None)  # the stage after another needs no model
    assert config.model == "init_from"
    config.model = name
    check(config)
    assert run_model.named(config) == QWEN
    assert lower.model_of(config).replace(mask_token_id=511) == QWEN
    config.init_from = ""
    with pytest.raises(InputError, match=r'config.init_from="": config.model=.* is the model of a checkpoint; set it'):
        check(config)


def test_a_preset_that_is_not_the_checkpoints_is_refused_with_all_that_differs(folders, tmp_path):
    config = config_of(folders, "sft", argument="tiny,length=64,steps=1")
    with pytest.raises(InputError) as caught:
        loop.train(config, str(tmp_path / "run"), jax.devices()[:1])
    for part in ("architecture='qwen3', hidden_size=24, num_layers=1", "intermediate_size=40",
                 "but model 'tiny' has 'llama', 128, 4,", "--config=FILE.py:init_from"):  # fmt: skip
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_experts_bias_is_the_checkpoints(folders):
    config = config_of(folders, "sft", "sparse")
    config.optimizer.expert_bias_rate = 1e-3
    check(config)
    assert SPARSE.expert_bias and run_model.fitted(config)
    config.init_from = str(folders / "qwen")
    with pytest.raises(InputError, match="expert_bias_rate=0.001, expected 0: the model has no expert bias"):
        run_model.fitted(config)


def test_rows_within_the_positions_that_the_model_knows():
    config = default_config("tiny")
    assert run_model.length_notice(config, QWEN.replace(max_position_embeddings=256)) == ""
    scaled = QWEN.replace(rope_scaling=RopeScaling("yarn", 2.0, 24))
    assert "yarn_factor" not in run_model.length_notice(config, scaled) and run_model.length_notice(config, scaled)
    config.yarn_factor = 6.0
    assert run_model.length_notice(config, extended(config, QWEN)) == ""
