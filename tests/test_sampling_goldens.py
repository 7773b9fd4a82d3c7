"""Decoding equals the reference token for token, in as many denoising passes."""

import numpy as np
import pytest
from conftest import EDIT_KEY, GEN_KEY, GOLDENS

import llada_jax
from llada_jax import GenerateConfig

MASK_ID = 511
CASES = [
    (name, key)
    for name in ("llada2_tiny", "llada2_tiny_yarn")
    for key in np.load(GOLDENS / name / "golden.npz").files
    if GEN_KEY.fullmatch(key) or EDIT_KEY.fullmatch(key)
]


def config_of(key: str) -> tuple[int, GenerateConfig]:
    if match := GEN_KEY.fullmatch(key):
        prompt, length, block, steps, threshold, early, eos = match.groups()
        extra = dict(steps=int(steps))
    else:
        prompt, length, block, threshold, editing, post, early, eos = EDIT_KEY.fullmatch(key).groups()
        extra = dict(rule="llada2.1", editing_threshold=float(editing), max_post_steps=int(post))
    return int(prompt), GenerateConfig(
        gen_length=int(length), block_length=int(block), threshold=float(threshold), eos_early_stop=early == "1",
        mask_id=MASK_ID, eos_id=int(eos), **extra,
    )  # fmt: skip


@pytest.mark.parametrize("name,key", CASES)
def test_tokens_and_passes(golden, name, key):
    model, g = golden(name)
    prompt, generate_config = config_of(key)
    out = llada_jax.generate(model.params, model.config, [g["input_ids"][0][:prompt]], generate_config)
    assert np.array_equal(out.tokens[0], g[key][0])
    assert out.forward_passes[0] == g["nfe_" + key]
