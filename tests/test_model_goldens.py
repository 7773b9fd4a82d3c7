"""Logits and masks equal those of the reference PyTorch implementation."""

import numpy as np
import pytest

import llada_jax
from llada_jax.model.forward import Execution

TOLERANCE = 2e-4  # float32; logits reach 20
DIFFUSION = ["llada2_tiny", "llada2_tiny_yarn"]


def assert_close(actual, expected):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", [*DIFFUSION, "ling_tiny", "ling_tiny_mtp"])
def test_causal_logits(golden, name):
    model, g = golden(name)
    assert_close(llada_jax.forward(model.params, model.config, g["input_ids"], mask="causal"), g["logits_causal"])


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_full_and_block_causal_logits(golden, name, attention):
    model, g = golden(name)

    def logits(mask):
        execution = Execution(attention=attention)
        return llada_jax.forward(model.params, model.config, g["input_ids"], mask=mask, execution=execution)

    assert_close(logits("full"), g["logits_full"])
    for block_size in (4, 8):
        assert_close(logits(("block_causal", block_size)), g[f"logits_block_causal_{block_size}"])


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("block_size", [1, 4, 8, 32])
@pytest.mark.parametrize("name", DIFFUSION)
def test_two_stream_logits_and_mask(golden, name, block_size, attention):
    model, g = golden(name)
    logits = llada_jax.denoise(
        model.params, model.config, g["noisy_ids"], g["input_ids"], block_size=block_size,
        execution=Execution(attention=attention),
    )  # fmt: skip
    assert_close(logits, g[f"logits_bd_{block_size}"])
    mask = llada_jax.block_diffusion_mask(32, block_size)
    assert mask.dtype == bool and np.array_equal(mask, g[f"mask_bd_{block_size}"])
