"""Prompts in chunks give the answers of prompts in one pass, and hold up decoding by one chunk at a time."""

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig, sharding
from llada_jax.attention.decoding import prefix
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.sampling import decode
from llada_jax.sampling.batching import Request, Usage, in_order, serve

TINY = preset("tiny").replace(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
CONFIGS = {
    "dense": TINY,
    "moe": preset("tiny_moe").replace(num_layers=2, hidden_size=64),
    "shifted": TINY.replace(alignment="shifted"),
}
B = 4
LENGTHS = (35, 1, 16, 3, 40, 17, 11, 28)


def model_of(config):
    """(params, config) of a random model whose tokens differ, with probabilities from 0.01 to nearly 1."""
    params = parameters.initialize(config, jax.random.key(0))
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params)
    head = "embedding" if config.tie_word_embeddings else "head"
    return params | {head: 30 * params[head]}, config


def requests(lengths=LENGTHS) -> list[Request]:
    rng = np.random.default_rng(2)
    settings = [GenerateConfig(9 + i, block_length=B, threshold=0.02, eos_id=-1) for i in range(len(lengths))]
    return [Request(rng.integers(0, 500, n), config) for n, config in zip(lengths, settings, strict=True)]


def whole(model, asked):
    return llada_jax.generate(*model, [r.prompt for r in asked], [r.config for r in asked])


def check_answers(answers, expected, asked, size):
    """Against a Generation of prompts in one pass."""
    assert [answer.index for answer in answers] == list(range(len(asked)))
    for i, answer in enumerate(answers):
        assert np.array_equal(answer.tokens, expected.tokens[i])
        assert np.array_equal(answer.written_at, expected.written_at[i])
        assert np.allclose(answer.confidence, expected.confidence[i], rtol=1e-4)
        assert answer.forward_passes == expected.forward_passes[i]
        assert answer.prefill_passes == -(-(len(asked[i].prompt) // B * B) // size)


@pytest.mark.parametrize("name,chunk", [("dense", 8), ("moe", 8), ("shifted", 18)])
def test_generate_in_chunks(name, chunk):
    """18: rounded down to 16, which does not divide the canvas."""
    model, asked = model_of(CONFIGS[name]), requests()
    expected = whole(model, asked)
    prompts, configs = [r.prompt for r in asked], [r.config for r in asked]
    found = llada_jax.generate(*model, prompts, configs, prefill_chunk=chunk)
    for i in range(len(asked)):
        assert np.array_equal(found.tokens[i], expected.tokens[i])
        assert np.array_equal(found.written_at[i], expected.written_at[i])
        assert np.allclose(found.confidence[i], expected.confidence[i], rtol=1e-4)
    size = chunk // B * B
    assert found.prefill_passes.tolist() == [-(-(n // B * B) // size) for n in LENGTHS]
    assert np.array_equal(found.positions_evaluated, expected.positions_evaluated)


def test_a_chunk_that_would_end_beyond_the_canvas():
    """42 tokens and 2 more in chunks of 16: the last one begins at 28, not at 32."""
    params, config = model_of(TINY)
    arguments = [np.random.default_rng(3).integers(0, 500, 42)], GenerateConfig(2, block_length=B, eos_id=-1)
    expected = llada_jax.generate(params, config, *arguments)
    found = llada_jax.generate(params, config, *arguments, prefill_chunk=16)
    assert np.array_equal(found.tokens[0], expected.tokens[0])
    assert np.allclose(found.confidence[0], expected.confidence[0], rtol=1e-4)


@pytest.mark.parametrize("name,rows,chunk", [("dense", 3, 8), ("shifted", 8, 12)])
def test_serve_in_chunks(name, rows, chunk):
    model, asked, usage = model_of(CONFIGS[name]), requests(), Usage()
    answers = list(in_order(serve(*model, asked, rows, 54, prefill_chunk=chunk, usage=usage)))
    check_answers(answers, whole(model, asked), asked, chunk)
    in_chunks = [-(-(n // B * B) // chunk) for n in LENGTHS if n // B * B > chunk]
    assert usage.prefill_passes >= sum(in_chunks)  # one row each; short prompts share theirs


def test_rows_decode_between_two_chunks(monkeypatch):
    """A prompt of 10 chunks comes in while another row decodes: never two chunks without a pass between them."""
    (params, config), calls = model_of(TINY), []
    fill, advance = decode.fill, decode.advance

    def filled(*args):
        calls.append("chunk")
        return fill(*args)

    def advanced(params, config, settings, state, iterations):
        state = advance(params, config, settings, state, iterations)
        calls.append(int(state.iterations))
        return state

    monkeypatch.setattr(decode, "fill", filled)
    monkeypatch.setattr(decode, "advance", advanced)
    settings = GenerateConfig(60, block_length=B, threshold=2.0, steps=B, eos_id=-1)
    asked = [Request(np.arange(3), settings), Request(np.arange(81), settings)]
    answers = list(serve(params, config, asked, 2, 160, prefill_chunk=8, admit_every=8))
    assert calls[:20] == ["chunk", 1] * 9 + ["chunk", 8]
    assert [answer.index for answer in answers] == [0, 1]


def test_over_a_mesh_each_device_fills_its_own_rows():
    """Two parts of the batch: as many passes as the part with more chunks takes, and the answers of one device."""
    params, config = model_of(CONFIGS["moe"])
    asked = requests((35, 32, 27, 31))
    expected = whole((params, config), asked)
    mesh = sharding.make_mesh(expert=2, devices=jax.devices()[:2])
    layouts = sharding.shardings(parameters.abstract(config), parameters.logical_axes(config), mesh)
    with jax.set_mesh(mesh):
        laid, execution = jax.device_put(params, layouts), Execution(expert_parallel="gather_tokens")
        how = dict(prefill_chunk=8, execution=execution)
        usage = Usage()
        answers = list(in_order(serve(laid, config, asked, 4, 48, usage=usage, **how)))
        check_answers(answers, expected, asked, 8)
        assert usage.prefill_passes == 8  # rows 0 and 1: 4 + 4 chunks; rows 2 and 3: 3 + 3
        together = llada_jax.generate(laid, config, [r.prompt for r in asked], [r.config for r in asked], **how)
    for i in range(4):
        assert np.array_equal(together.tokens[i], expected.tokens[i])


def test_by_kernels(monkeypatch):
    """Interpreted: the chunk's attention is training's kernel over own and cached keys."""
    monkeypatch.setattr(prefix, "MOST_OF_A_WINDOW", 32)  # a chunk's 64 are more, a window of two blocks' are not
    params, config = model_of(TINY.replace(num_layers=1))
    prompt = np.random.default_rng(0).integers(0, 500, 75)
    settings = GenerateConfig(8, block_length=8, threshold=0.02, eos_id=-1)
    expected = llada_jax.generate(params, config, [prompt], settings)
    kernel = Execution(attention="kernel", interpret=True)
    found = llada_jax.generate(params, config, [prompt], settings, execution=kernel, prefill_chunk=32)
    assert np.array_equal(found.tokens[0], expected.tokens[0])
    assert np.allclose(found.confidence[0], expected.confidence[0], rtol=1e-4)
    assert found.prefill_passes.tolist() == [3]


def test_windows_of_several_rows_never_take_the_path_of_chunks(monkeypatch):
    """However large their blocks are: that path knows one row on each device."""
    monkeypatch.setattr(prefix, "MOST_OF_A_WINDOW", 8)
    params, config = model_of(TINY.replace(num_layers=1))
    rng, settings = np.random.default_rng(1), GenerateConfig(20, block_length=8, threshold=0.3, eos_id=-1)
    prompts = [rng.integers(0, 500, n) for n in (17, 3)]
    expected = llada_jax.generate(params, config, prompts, settings, fuse_share=0)
    kernel = Execution(attention="kernel", interpret=True)
    found = llada_jax.generate(params, config, prompts, settings, execution=kernel, fuse_share=0)
    for i in range(2):
        assert np.array_equal(found.tokens[i], expected.tokens[i])


@pytest.mark.parametrize("chunk", [0, -4, 7.5, True, None, "8"])
def test_refuses_a_chunk_that_is_no_number_of_tokens(chunk):
    with pytest.raises(InputError, match=f"prefill_chunk={chunk!r}, expected a positive integer"):
        llada_jax.generate(*model_of(TINY), [np.arange(3)], GenerateConfig(4), prefill_chunk=chunk)
