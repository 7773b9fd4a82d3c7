"""The training configuration: what it resolves to."""

import dataclasses
import json

import jax
import pytest

from llada_jax.config_fields import flat
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.diffusion.editing import Editing
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.diffusion.preference import Preference
from llada_jax.errors import InputError
from llada_jax.model.config import RopeScaling, preset
from llada_jax.model.forward import Execution
from llada_jax.training import stages
from llada_jax.training.config import (
    check,
    default_config,
    execution,
    extended,
    objective,
    phases,
    preference,
    readme,
    write,
)
from llada_jax.training.sections import TrainConfig
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("backend, expected", [("tpu", "kernel"), ("cpu", "blockwise"), ("gpu", "blockwise")])
def test_real_models_take_the_kernel_on_a_tpu_and_blockwise_attention_elsewhere(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for stage in ("wsd", "sft", "cap", "dpo"):
        config = stages.parse(stage, "llada2_mini")
        assert execution(config).attention == expected
        assert execution(config).experts == ("megablox" if backend == "tpu" else "xla")
    config.execution.attention = "dense"
    assert execution(config).attention == "dense"


def test_yarn_extends_what_the_model_knows():
    config = default_config("llada2_mini")
    mini = preset("llada2_mini")
    assert extended(config, mini) == mini
    config.yarn_factor = 2.0
    longer = extended(config, mini)
    assert longer.rope_scaling == RopeScaling("yarn", 2.0, 32768) and longer.max_position_embeddings == 65536
    with pytest.raises(InputError, match="config.yarn_factor=2.0: .* has rope_scaling already"):
        extended(config, longer)


def test_the_document_mask_is_on_and_dpo_needs_it():
    config = default_config("tiny")
    assert objective(config).document_mask
    config.objective.document_mask = False
    assert not objective(config).document_mask
    config.preference.enabled, config.init_from = True, "/some/run"
    with pytest.raises(InputError, match="nor without objective.document_mask"):
        check(config)


def test_defaults_are_those_of_the_objects_that_are_made_of_them():
    config = default_config("tiny")
    assert objective(config) == Objective()
    assert execution(config, "cpu") == Execution(dtype="float32")
    config.preference.enabled, config.init_from = True, "/some/run"
    assert preference(config) == Preference()


def test_fields_reach_the_objects_by_name():
    config = default_config("tiny")
    config.objective.update(
        time_weight="uniform", normalizer="masked", times="sequence", rate_low=0.1, rate_high=0.9, spread=True,
        masking="fixed_count", complementary=True, block_origin="document", confidence_weight=2.0,
        confidence_temperature=0.5, document_mask=False, group_blocks=3,
    )  # fmt: skip
    edits = dict(
        weight=0.5, replace_low=0.1, replace_high=0.2, turns=3, draft_share=0.25, threshold_low=0.3, threshold_high=0.4,
        editing_low=0.5, editing_high=0.6,
    )  # fmt: skip
    config.editing.update(edits)
    noise = NoiseSpec(times="sequence", rate_low=0.1, rate_high=0.9, masking="fixed_count", spread=True)
    expected = Objective(
        noise=noise, time_weight="uniform", normalizer="masked", complementary=True, block_origin="document",
        confidence_weight=2.0, confidence_temperature=0.5, document_mask=False, group_blocks=3,
        editing=Editing(**edits),
    )  # fmt: skip
    assert objective(config) == objective(TrainConfig.from_config_dict(config)) == expected
    editing = objective(config, byte_tokenizer(508, 511)).editing
    assert editing == Editing(**edits, vocab_size=256)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"editing.weight": -1.0}, "editing.weight=-1.0"),
        ({"editing.turns": 2, "schedule.kind": "ar"}, "config.editing: not with config.schedule.kind=ar"),
        ({"editing.weight": 1.0, "preference.enabled": True}, "config.editing: not with config.preference.enabled"),
        ({"objective.group_blocks": 2, "schedule.kind": "ar"}, "config.objective.group_blocks=2, expected 1"),
        ({"editing.turns": 2, "editing.draft_share": 0.0}, "config.editing.draft_share=0.0, expected more"),
        (
            {"objective.group_blocks": 2, "schedule.kind": "constant", "schedule.block_size": 256},
            "config.objective.group_blocks=2, expected 1 where a row is one block",
        ),
        ({"editing.labels": "x"}, "editing.labels='x'"),
        ({"editing.labels": "levenshtein"}, 'editing.labels="levenshtein": of drafts'),
        ({"editing.labels": "levenshtein", "editing.turns": 2}, "not with schedule.kind='wsd'"),
        ({"editing.replace_high": 0.5, "compiled_step": "x"}, "config.compiled_step=x: it knows no tokenizer"),
    ],
)
def test_editing_is_refused_where_it_would_do_nothing(changes, message):
    config = default_config("tiny")
    config.init_from = "/some/run"
    for field, value in changes.items():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        check(config)


def test_fields_that_an_older_version_did_not_have_changed_if_they_are_set(tmp_path, capsys):
    config, path = stages.sft("tiny", length=128), tmp_path / "config.json"
    old = json.loads(config.to_json())
    del old["editing"], old["objective"]["group_blocks"]
    path.write_text(json.dumps(old))
    config.editing.weight = 1.0
    write(config, path)
    assert capsys.readouterr().out == "config.editing.weight was None, is now 1.0\n"
    assert json.loads(path.read_text())["editing"]["weight"] == 1.0


def test_a_frozen_config_has_the_values_of_its_dict():
    config = stages.dpo("tiny", length=128)
    config.evaluation.block_sizes, config.optimizer.clip_norm = [32, 128], 2
    frozen = TrainConfig.from_config_dict(config)
    assert json.loads(frozen.to_json()) == json.loads(config.to_json())
    assert (frozen.evaluation.block_sizes, frozen.optimizer.learning_rate) == ((32, 128), None)
    assert type(frozen.optimizer.clip_norm) is float and phases(frozen) == phases(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.batch.rows = 3
    resolved = config.copy_and_resolve_references()
    assert TrainConfig.from_config_dict(resolved) == frozen and resolved.to_json() == config.to_json()


def test_the_table_of_keys_is_that_of_the_code():
    """Written by python -m llada_jax.training.config > configs/README.md."""
    assert (ROOT / "configs" / "README.md").read_text() == readme()
    keys = [name for name, _ in flat(default_config("tiny"))]
    assert all(readme().count(f"| `{key}` |") == 1 for key in keys) and readme().count("\n| `") == len(keys)
