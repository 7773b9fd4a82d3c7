"""Continuous batching gives each request what it would get alone."""

import dataclasses

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Answer, Batch, Request, Usage, in_order, serve

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


def run(batch: Batch, steps=1000, **how) -> list[Answer]:
    """Answers of what is in the batch, by number, after at most so many steps."""
    answers = []
    while batch.free < batch.rows and steps:
        answers += batch.step(**how).answers
        steps -= 1
    return sorted(answers, key=lambda answer: answer.index)


def check_equal(found: Answer, expected: Answer):
    for field in dataclasses.fields(found):
        if field.name != "index":
            assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_row_is_free_and_disturbs_no_other(params, steps):
    """Whether it has not begun, its prompt is in chunks, or it decodes. All commits are separate, as alone."""

    def batch():
        return Batch(params, CONFIG, 3, 60, admit_every=2, fuse_share=2.0, prefill_chunk=8)

    rng = np.random.default_rng(0)
    first, gone, third, late = (Request(rng.integers(0, 500, n), config(20), seed=n) for n in (5, 27, 11, 9))
    alone = []
    for request in (first, third, late):
        one = batch()
        one.admit(0, request)
        alone += run(one)
    together = batch()
    for i, request in enumerate((first, gone, third)):
        together.admit(i, request)
    assert run(together, steps) == [] and together.free == 0
    together.cancel(1)
    together.cancel(1)
    together.cancel(7)
    assert together.free == 1
    before = together.usage.running_row_passes
    passes = together.usage.iterations
    together.step(1)
    assert together.usage.running_row_passes - before == 2 * (together.usage.iterations - passes)
    together.admit(3, late)
    for found, expected in zip(run(together), alone, strict=True):
        check_equal(found, expected)


def test_tells_of_blocks_as_they_stand(params):
    """What is written in them is what the answer says, by the step that wrote it."""
    batch = Batch(params, CONFIG, 2, 40)
    batch.admit(0, Request(np.arange(6), config(9)))
    batch.admit(1, Request(np.arange(3), config(8)))
    seen, told = [], 0
    while batch.free < 2:
        progress = batch.step(1, standing={0})
        assert 1 not in progress.standing
        told += len(progress.new[0].tokens) if 0 in progress.new else 0
        if 0 in progress.standing:
            seen.append((told, progress.standing[0]))
        answers = {answer.index: answer for answer in progress.answers}
        if 0 in answers:
            answer = answers[0]
    assert {told: len(block.tokens) for told, block in seen} == {
        0: 2,
        2: 4,
        6: 3,
    }  # less the prompt, and what is beyond
    for told, block in seen:
        written = block.written_at >= 0
        place = slice(told, told + len(written))
        assert np.array_equal(block.tokens == CONFIG.mask_token_id, ~written)
        for found, final in zip(block, (answer.tokens, answer.written_at, answer.confidence), strict=True):
            assert np.array_equal(found[written], final[place][written])
        assert not block.confidence[~written].any() and (block.written_at[~written] == -1).all()
    shares = {told: [(block.written_at >= 0).sum() for at, block in seen if at == told] for told, _ in seen}
    assert all(counts == sorted(counts) for counts in shares.values())


def test_what_cannot_join_a_batch_leaves_it_as_it_is(params):
    batch = Batch(params, CONFIG, 2, 40)
    batch.admit(0, Request(np.arange(6), config()))
    other = GenerateConfig(gen_length=8, block_length=8)
    assert batch.fits(config(3)) and not batch.fits(other)
    with pytest.raises(InputError, match="block_length: 4 and 8 in one batch"):
        batch.admit(1, Request(np.arange(6), other))
    with pytest.raises(InputError, match="request 1: seed=-1"):
        batch.admit(1, Request(np.arange(6), config(), seed=-1))
    assert batch.free == 1 and [answer.index for answer in run(batch)] == [0]
    assert not batch.fits(other)  # its rows are laid out for blocks of 4
    batch.clear()
    batch.admit(1, Request(np.arange(6), other))
    assert [answer.index for answer in run(batch)] == [1] and batch.step().answers == []
