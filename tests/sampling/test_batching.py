"""Continuous batching gives each request what it would get alone."""

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Request, Usage, in_order, serve

CONFIG = preset("tiny").replace(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
B = 4


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, parameters.initialize(CONFIG, jax.random.key(0)))


def config(gen_length=8, **changes):
    return GenerateConfig(gen_length=gen_length, block_length=B, threshold=0.02, eos_id=-1, **changes)


def ragged(count: int) -> list[Request]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 500, rng.integers(1, 20)) for _ in range(count)]
    return [Request(prompt, config(int(rng.integers(2, 20)))) for prompt in prompts]


def test_equals_generate_whatever_the_batch(params):
    requests = ragged(9)
    together = llada_jax.generate(params, CONFIG, [r.prompt for r in requests], [r.config for r in requests])
    for rows, every in ((1, 5), (4, 2)):
        usage = Usage()
        answers = list(in_order(serve(params, CONFIG, iter(requests), rows, 40, admit_every=every, usage=usage)))
        assert [answer.index for answer in answers] == list(range(9))
        for i, answer in enumerate(answers):
            assert np.array_equal(answer.tokens, together.tokens[i])
            assert np.array_equal(answer.written_at, together.written_at[i])
            assert np.allclose(answer.confidence, together.confidence[i], rtol=1e-4)
            assert answer.forward_passes == together.forward_passes[i]
        passes = sum(answer.forward_passes + answer.commit_passes for answer in answers)
        assert usage.busy == pytest.approx(passes / (usage.iterations * rows))
        evaluated = sum(answer.positions_evaluated for answer in answers)
        assert usage.decoding_positions + usage.prefill_positions >= evaluated


def test_rows_are_given_to_the_next_request_and_the_stream_is_read_as_needed(params):
    read = []

    def stream():
        for request in ragged(20):
            read.append(request)
            yield request

    answers = serve(params, CONFIG, stream(), 2, 40, admit_every=2)
    next(answers)
    assert len(read) < 8
    usage = Usage()
    assert len(list(serve(params, CONFIG, ragged(40), 4, 40, admit_every=1, usage=usage))) == 40
    assert usage.busy > 0.85


def test_draws_depend_on_the_seed_alone(params):
    drawing = config(12, temperature=1.0, top_p=0.9)
    requests = [Request(np.arange(3), drawing, seed=7), Request(np.arange(5), config(3)), *ragged(2)]
    requests.append(Request(np.arange(3), drawing, seed=7))
    first, *_, last = in_order(serve(params, CONFIG, requests, 2, 40, admit_every=3))
    other = next(serve(params, CONFIG, [Request(np.arange(3), drawing, seed=8)], 1, 40))
    assert np.array_equal(first.tokens, last.tokens) and not np.array_equal(first.tokens, other.tokens)


def test_blocks_of_an_answer_share_no_draws(params):
    ignorant = jax.tree.map(np.zeros_like, params)  # every token is as likely: draws are all that tells blocks apart
    drawing = GenerateConfig(gen_length=4 * B, block_length=B, temperature=1.0, threshold=0.0, eos_id=-1)
    (tokens,) = llada_jax.generate(ignorant, CONFIG, [np.arange(B)], drawing).tokens
    assert len({tuple(block) for block in tokens.reshape(4, B)}) == 4


def test_tells_of_new_tokens_as_blocks_are_finished(params):
    told = {}

    def on_tokens(index, tokens):
        told.setdefault(index, []).append(tokens)

    requests = [Request(np.arange(6), config(15)), Request(np.arange(3), config(4))]
    answers = list(in_order(serve(params, CONFIG, requests, 2, 40, admit_every=1, on_tokens=on_tokens)))
    for answer in answers:
        assert np.array_equal(np.concatenate(told[answer.index]), answer.tokens)
    assert [len(tokens) for tokens in told[0]] == [2, 4, 4, 4, 1]  # the prompt's tail fills half of the first block


def test_an_end_of_sequence_frees_the_row(params):
    free = llada_jax.generate(params, CONFIG, [np.arange(6)], config(16))
    eos = int(free.tokens[0][3])
    ending = GenerateConfig(gen_length=16, block_length=B, threshold=0.02, eos_id=eos)
    (answer,) = serve(params, CONFIG, [Request(np.arange(6), ending)], 1, 40)
    expected = llada_jax.generate(params, CONFIG, [np.arange(6)], ending)
    assert np.array_equal(answer.tokens, expected.tokens[0]) and len(answer.tokens) <= 4
    assert answer.forward_passes < free.forward_passes[0]


def test_refuses_what_cannot_be_served(params):
    with pytest.raises(InputError, match="request 1: 30 prompt tokens and gen_length=11, expected at most 40"):
        list(serve(params, CONFIG, [Request(np.arange(3), config()), Request(np.arange(30), config(11))], 2, 40))
    with pytest.raises(InputError, match="rows=0"):
        next(serve(params, CONFIG, [], 0, 40))
    assert list(serve(params, CONFIG, [], 2, 40)) == []
