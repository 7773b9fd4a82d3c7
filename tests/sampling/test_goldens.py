"""Decoding equals the reference token for token, in as many denoising passes: in ragged batches and alone."""

import collections

import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from tests.helpers.paths import EDIT_KEY, GEN_KEY, GOLDENS

MASK_ID = 511


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


def batches() -> dict:
    """{(checkpoint, rule, block length): keys}: all that one program decodes, whatever their other settings."""
    found = collections.defaultdict(list)
    for name in ("llada2_tiny", "llada2_tiny_yarn"):
        for key in np.load(GOLDENS / name / "golden.npz").files:
            if GEN_KEY.fullmatch(key) or EDIT_KEY.fullmatch(key):
                _, config = config_of(key)
                found[name, config.rule, config.block_length].append(key)
    return dict(found)


BATCHES = batches()


def check(model, golden, keys, fuse_share):
    prompts = [golden["input_ids"][0][: config_of(key)[0]] for key in keys]
    configs = [config_of(key)[1] for key in keys]
    out = llada_jax.generate(model.params, model.config, prompts, configs, fuse_share=fuse_share)
    for row, key in enumerate(keys):
        assert np.array_equal(out.tokens[row], golden[key][0]), key
        assert out.forward_passes[row] == golden["nfe_" + key], key
    return out


@pytest.mark.parametrize("case", BATCHES, ids=lambda case: "-".join(map(str, case)))
def test_tokens_and_passes(golden, case):
    model, g = golden(case[0])
    keys = BATCHES[case]
    fused = check(model, g, keys, 0.0)
    assert fused.commit_passes.sum() == 0
    check(model, g, keys, 0.5)
    separate = check(model, g, keys, 2.0)
    for row, key in enumerate(keys):  # every block but the last was committed, once
        prompt, config = config_of(key)
        stops = config.rule == "llada2" or config.eos_early_stop
        last = prompt + (len(separate.tokens[row]) if stops else config.gen_length) - 1
        assert separate.commit_passes[row] == last // config.block_length - prompt // config.block_length


def test_there_are_goldens_of_both_rules():
    assert sum(map(len, BATCHES.values())) == 42 and {rule for _, rule, _ in BATCHES} == {"llada2", "llada2.1"}


@pytest.mark.parametrize("rule", ["llada2", "llada2.1"])
def test_alone(golden, rule):
    model, g = golden("llada2_tiny")
    key = next(keys[-1] for (name, its_rule, _), keys in BATCHES.items() if (name, its_rule) == ("llada2_tiny", rule))
    check(model, g, [key], 0.5)
