"""Experts in int8: how far the quantiser is off, and passes and decoding with them against their float weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig, sharding
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.model import experts, parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.model.grouped_matmul import dequantized
from llada_jax.sampling.quantize import has_int8_experts, quantize_experts
from tests.helpers.command_lines import run

CONFIG = preset("tiny_moe").replace(num_layers=3)


@pytest.fixture(scope="module")
def params():
    params = parameters.initialize(CONFIG, jax.random.key(3))
    return jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params)  # logits with some spread


def as_floats(params, dtype="float32"):
    """The weights that the integers stand for, in a tree without scales."""
    sparse = {name: w for name, w in params["sparse"].items() if name not in experts.SCALES}
    for name, scale in zip(experts.EXPERTS, experts.SCALES, strict=True):
        sparse[name] = dequantized(sparse[name], params["sparse"][scale], dtype)
    return params | {"sparse": sparse}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_weight_is_off_by_half_a_scale_of_its_channel_at_most(params, dtype):
    given = jax.tree.map(lambda w: w.astype(dtype), params)
    found = quantize_experts(given, CONFIG)["sparse"]
    for name, scale in zip(experts.EXPERTS, experts.SCALES, strict=True):
        exact, steps = np.asarray(given["sparse"][name], np.float64), np.asarray(found[scale], np.float64)
        assert found[name].dtype == jnp.int8 and found[scale].dtype == jnp.float32
        assert found[scale].shape == (*exact.shape[:2], 1, exact.shape[3])
        assert np.allclose(steps[:, :, 0] * 127, np.abs(exact).max(axis=2))
        integers = np.asarray(found[name], np.float64)
        assert (np.abs(integers).max(axis=2) == 127).all()  # all of the range is used, in each channel
        assert (np.abs(exact - integers * steps) <= steps / 2 * (1 + 1e-5)).all()


def test_a_channel_of_zeros_stays_zero_and_all_else_is_as_it_was(params):
    gate = params["sparse"]["gate"].at[1, 2, :, 3].set(0).at[0, 0, :, 0].set(1e-42)  # the latter: no normal float
    given = params | {"sparse": params["sparse"] | {"gate": gate}}
    found = quantize_experts(given, CONFIG)
    assert not found["sparse"]["gate"][1, 2, :, 3].any() and found["sparse"]["gate_scale"][1, 2, 0, 3] == 1
    assert not found["sparse"]["gate"][0, 0, :, 0].any() and np.isfinite(found["sparse"]["gate_scale"]).all()
    assert found["embedding"] is given["embedding"] and found["sparse"]["router"] is given["sparse"]["router"]
    assert given["sparse"]["gate"] is gate and not gate.is_deleted()


def test_donated_experts_are_deleted(params):
    given = jax.tree.map(jnp.copy, params)
    quantize_experts(given, CONFIG, donate=True)
    assert {name for name, w in given["sparse"].items() if w.is_deleted()} == set(experts.EXPERTS)
    assert not has_int8_experts(params) and has_int8_experts(quantize_experts(params, CONFIG))


def test_what_is_refused(params, tmp_path):
    dense = preset("tiny")
    with pytest.raises(InputError, match="experts_dtype=int8: the model is dense"):
        quantize_experts(llada_jax.init(dense, jax.random.key(0)), dense)
    found = quantize_experts(params, CONFIG)
    with pytest.raises(InputError, match="int8 already"):
        quantize_experts(found, CONFIG)
    with pytest.raises(InputError, match="sparse.down_scale is only in the given tree"):
        llada_jax.save_params(tmp_path / "saved", found, CONFIG)
    tokens = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(TypeError, match="int8"):  # training has no gradient of integers
        jax.grad(lambda params: llada_jax.forward(params, CONFIG, tokens).sum())(found)


@pytest.mark.parametrize("mask", ["full", ("block_causal", 8)])
def test_passes_without_a_cache_are_those_of_the_float_weights(params, mask):
    found = quantize_experts(params, CONFIG)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 256)
    logits, expected = (llada_jax.forward(p, CONFIG, tokens, mask) for p in (found, as_floats(found)))
    assert np.allclose(logits, expected, atol=1e-5)
    exact = llada_jax.forward(params, CONFIG, tokens, mask)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_no_stack_of_floats_is_made():
    """A layer's sums of a few tokens, from stacks much larger than they are."""
    tokens, k, shape = 8, 2, (4, 16, 128, 256)
    into, out = (jax.ShapeDtypeStruct(s, jnp.int8) for s in (shape, (*shape[:2], 256, 128)))
    stacks = dict(gate=into, up=into, down=out)
    stacks |= {f"{name}_scale": jax.ShapeDtypeStruct((4, 16, 1, w.shape[3]), jnp.float32) for name, w in stacks.items()}

    def run(x, chosen, weights, stacks, layer):
        move = experts.sort_by_expert(chosen, 16)
        return experts.combine_in_stacks(x, move, weights, stacks | {"layer": layer})

    arrays = [((tokens, 128), jnp.float32), ((k, tokens), jnp.int32), ((k, tokens), jnp.float32)]
    x, chosen, weights = (jax.ShapeDtypeStruct(*array) for array in arrays)
    program = jax.jit(run).lower(x, chosen, weights, stacks, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    one_expert = 4 * 128 * 256
    assert program.memory_analysis().temp_size_in_bytes < 4 * one_expert


PROMPTS = [np.arange(n) for n in (3, 9, 14, 6)]
GENERATION = GenerateConfig(gen_length=12, block_length=4, threshold=0.3, eos_id=-1)


def test_decoding_is_that_of_the_float_weights(params):
    found = quantize_experts(params, CONFIG)
    out, expected, exact = (
        llada_jax.generate(p, CONFIG, PROMPTS, GENERATION) for p in (found, as_floats(found), params)
    )
    assert all(np.array_equal(a, b) for a, b in zip(out.tokens, expected.tokens, strict=True))
    for a, b in zip(out.confidence, expected.confidence, strict=True):
        assert np.allclose(a, b, atol=1e-5)
    assert not all(np.allclose(a, b, atol=1e-5) for a, b in zip(out.confidence, exact.confidence, strict=True))


@pytest.mark.parametrize(
    ("sizes", "expert_parallel"),
    [
        (dict(expert=2), "gather_tokens"),
        (dict(expert=2, tensor=2), "gather_tokens"),
        (dict(expert=2), "gather_weights"),
        (dict(fsdp=2, tensor=2), "gather_weights"),
    ],
)
def test_a_mesh_shares_scales_out_with_their_experts(params, sizes, expert_parallel):
    expected = quantize_experts(params, CONFIG)
    answers = llada_jax.generate(expected, CONFIG, PROMPTS, GENERATION)
    mesh = sharding.make_mesh(**{"data": 1} | sizes, devices=jax.devices()[: np.prod([*sizes.values()])])
    placed = jax.device_put(params, sharding.shardings(params, parameters.logical_axes(CONFIG), mesh))
    found = quantize_experts(placed, CONFIG)
    axes = parameters.layer_axes(CONFIG, "sparse", found["sparse"])
    for name in (*experts.EXPERTS, *experts.SCALES):
        w = found["sparse"][name]
        layout = jax.NamedSharding(mesh, sharding.spec(("layers", *axes[name]), w.shape, mesh))
        assert w.sharding.is_equivalent_to(layout, w.ndim)
        assert np.array_equal(w, expected["sparse"][name])
    with jax.set_mesh(mesh):
        out = llada_jax.generate(
            found, CONFIG, PROMPTS, GENERATION, execution=Execution(expert_parallel=expert_parallel)
        )
    assert all(np.array_equal(a, b) for a, b in zip(out.tokens, answers.tokens, strict=True))


def test_the_flag(params, tmp_path):
    """The command decodes with int8 what Python does; a dense model is refused in one line."""
    tokenizer = byte_tokenizer(CONFIG.eos_token_id, CONFIG.mask_token_id)
    llada_jax.save_params(tmp_path / "moe", params, CONFIG, tokenizer)
    dense = preset("tiny").replace(num_layers=1)
    llada_jax.save_params(tmp_path / "dense", llada_jax.init(dense, jax.random.key(0)), dense, tokenizer)
    (tmp_path / "in.jsonl").write_text('{"prompt": "def f("}\n')
    command = [
        "tools/generate.py", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--mesh=one",
        "--gen_length=8", "--block_length=4", "--threshold=0.3", "--experts_dtype=int8",
    ]  # fmt: skip
    done = run([*command, f"--checkpoint={tmp_path / 'moe'}"])
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "out.jsonl").read_text())
    settings = GenerateConfig(gen_length=8, block_length=4, threshold=0.3)
    prompt = np.array(tokenizer.encode("def f("))
    in_int8, exact = (
        llada_jax.generate(p, CONFIG, [prompt], settings) for p in (quantize_experts(params, CONFIG), params)
    )
    assert line["token_ids"] == in_int8.tokens[0].tolist()
    found = np.array(line["confidences"])
    assert np.allclose(found, in_int8.confidence[0], atol=1e-4)
    assert len(found) != len(exact.confidence[0]) or not np.allclose(found, exact.confidence[0], atol=1e-4)
    done = run([*command, f"--checkpoint={tmp_path / 'dense'}"])
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("the model is dense, it has no experts")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_weights_that_are_not_finite(bad):
    config = preset("tiny_moe").replace(num_layers=2, hidden_size=32)
    params = parameters.initialize(config, jax.random.key(0))
    sparse = params["sparse"] | {"up": params["sparse"]["up"].at[0, 1, 2, 3].set(bad)}
    with pytest.raises(InputError, match="sparse/up holds weights that are not finite"):
        quantize_experts(params | {"sparse": sparse}, config)
