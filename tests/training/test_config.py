"""The training configuration: what it resolves to."""

import jax
import pytest

from llada_jax.errors import InputError
from llada_jax.model.config import RopeScaling, preset
from llada_jax.training import config as settings
from llada_jax.training import stages


@pytest.mark.parametrize("backend, expected", [("tpu", "kernel"), ("cpu", "blockwise"), ("gpu", "blockwise")])
def test_real_models_take_the_kernel_on_a_tpu_and_blockwise_attention_elsewhere(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for stage in ("wsd", "sft", "cap", "dpo"):
        config = stages.parse(stage, "llada2_mini")
        assert settings.execution(config).attention == expected
        assert settings.execution(config).experts == ("megablox" if backend == "tpu" else "xla")
    config.execution.attention = "dense"
    assert settings.execution(config).attention == "dense"


def test_yarn_extends_what_the_model_knows():
    config = settings.default_config("llada2_mini")
    mini = preset("llada2_mini")
    assert settings.extended(config, mini) == mini
    config.yarn_factor = 2.0
    longer = settings.extended(config, mini)
    assert longer.rope_scaling == RopeScaling("yarn", 2.0, 32768) and longer.max_position_embeddings == 65536
    with pytest.raises(InputError, match="config.yarn_factor=2.0: .* has rope_scaling already"):
        settings.extended(config, longer)


def test_the_document_mask_is_on_and_dpo_needs_it():
    config = settings.default_config("tiny")
    assert settings.objective(config).document_mask
    config.objective.document_mask = False
    assert not settings.objective(config).document_mask
    config.preference.enabled, config.init_from = True, "/some/run"
    with pytest.raises(InputError, match="nor without objective.document_mask"):
        settings.check(config)
