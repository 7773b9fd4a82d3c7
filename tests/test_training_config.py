"""The training configuration: what it resolves to."""

import jax
import pytest

from llada_jax.training import config as settings


@pytest.mark.parametrize("backend, expected", [("tpu", "kernel"), ("cpu", "blockwise"), ("gpu", "blockwise")])
def test_real_models_take_the_kernel_on_a_tpu_and_blockwise_attention_elsewhere(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for stage in ("wsd", "sft", "cap", "dpo"):
        config = settings.load_sibling("configs/ar.py", stage).get_config("llada2_mini")
        assert settings.execution(config).attention == expected
        assert settings.execution(config).experts == ("megablox" if backend == "tpu" else "xla")
    config.execution.attention = "dense"
    assert settings.execution(config).attention == "dense"
