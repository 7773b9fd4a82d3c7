"""Prompts that begin like earlier ones: their answers are those of prompts that are computed, bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest

from llada_jax import GenerateConfig, sharding
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.sampling.batches.prefixes import Prefixes, chunk_bytes
from llada_jax.sampling.batching import Batch, Request, Usage

TINY = preset("tiny").replace(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
CONFIGS = {
    "dense": TINY,
    "moe": preset("tiny_moe").replace(num_layers=2, hidden_size=64),
    "shifted": TINY.replace(alignment="shifted"),
}
B, CHUNK, LENGTH = 4, 8, 64
PLENTY = 2**30


def params_of(config):
    params = parameters.initialize(config, jax.random.key(0))
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params)
    head = "embedding" if config.tie_word_embeddings else "head"
    return params | {head: 30 * params[head]}


def request(*parts: int, gen_length=9) -> Request:
    """Its prompt: so many tokens of each of several texts, one after the other."""
    texts = [np.random.default_rng(i).integers(0, 500, 50)[:n] for i, n in enumerate(parts)]
    return Request(np.concatenate(texts), GenerateConfig(gen_length, block_length=B, threshold=0.02, eos_id=-1), seed=0)


# Five whole chunks and the start of a sixth; the same; with another end; two of the chunks; a short one; the five
# alone; and another text.
ASKED = [request(44), request(44), request(44, 7), request(20, 15), request(7), request(40), request(0, 30)]


def run(batch: Batch, requests) -> list:
    """Answers, in the order of the requests, each of which comes when there is a free row."""
    answers, waiting = [], list(enumerate(requests))
    while waiting or batch.free < batch.rows:
        while waiting and batch.free:
            batch.admit(*waiting.pop(0))
        answers += batch.step().answers
    return sorted(answers, key=lambda answer: answer.index)


def batch_of(config, params, prefixes=None, rows=1, usage=None, **how) -> Batch:
    return Batch(params, config, rows, LENGTH, usage=usage, prefill_chunk=CHUNK, prefixes=prefixes, **how)


def check_equal(found, expected):
    """All that an answer has, but the work of its prefill."""
    apart = ("index", "reused_tokens", "prefill_passes", "positions_evaluated")
    for a, b in zip(found, expected, strict=True):
        for field in dataclasses.fields(a):
            if field.name not in apart:
                assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_same_and_what_is_known_is_not_computed(name):
    config = CONFIGS[name]
    params, computed, usage, prefixes = params_of(config), Usage(), Usage(), Prefixes(PLENTY)
    expected = run(batch_of(config, params, usage=computed), ASKED)
    found = run(batch_of(config, params, prefixes, usage=usage), ASKED)
    check_equal(found, expected)
    reused = [answer.reused_tokens for answer in found]
    assert reused == [0, 40, 40, 16, 0, 32, 0]  # the chunk that ends a prompt is computed
    for a, b, n in zip(found, expected, reused, strict=True):
        assert (b.prefill_passes - a.prefill_passes, b.positions_evaluated - a.positions_evaluated) == (n // CHUNK, n)
    assert computed.prefill_passes - usage.prefill_passes == prefixes.hits == sum(reused) // CHUNK


def test_rows_of_one_batch_share_what_is_known():
    """Asked at once: the later ones wait for the first one's chunks, and take them."""
    params, prefixes = params_of(TINY), Prefixes(PLENTY)
    asked = [request(44, i) for i in range(5)]
    expected = [run(batch_of(TINY, params, rows=3), [each])[0] for each in asked]
    found = run(batch_of(TINY, params, prefixes, rows=3), asked)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.written_at, b.written_at)
    assert [answer.reused_tokens for answer in found] == [0, 40, 40, 40, 40]


def test_another_token_at_the_start_is_another_prompt():
    params, prefixes = params_of(TINY), Prefixes(PLENTY)
    one = request(44)
    other = dataclasses.replace(one, prompt=np.concatenate([[1 + one.prompt[0]], one.prompt[1:]]))
    (expected,) = run(batch_of(TINY, params), [other])
    _, first, second = run(batch_of(TINY, params, prefixes), [one, other, other])
    assert (first.reused_tokens, second.reused_tokens) == (0, 40)  # its own chunks, not those of equal tokens
    for found in (first, second):
        check_equal([found], [expected])


def test_blocks_of_another_length_are_other_keys():
    """As are those of another canvas or chunk: the prompt's chunks are the same, what is in them is not."""
    params, prefixes = params_of(TINY), Prefixes(PLENTY)
    eight = [dataclasses.replace(each, config=dataclasses.replace(each.config, block_length=8)) for each in ASKED[:2]]
    expected = run(batch_of(TINY, params), eight)
    batch = batch_of(TINY, params, prefixes)
    run(batch, ASKED[:1])
    batch.clear()
    found = run(batch, eight)
    check_equal(found, expected)
    assert [answer.reused_tokens for answer in found] == [0, 32]


def test_what_was_used_least_recently_is_given_up():
    params, room = params_of(TINY), chunk_bytes(TINY, Execution(), CHUNK, "float32")
    prefixes = Prefixes(7 * room)
    batch = batch_of(TINY, params, prefixes)
    first, second, third = request(44), request(0, 27), request(0, 0, 18)

    def reused(asked):
        (answer,) = run(batch, [asked])
        assert prefixes.bytes == len(prefixes) * room <= 7 * room
        return answer.reused_tokens

    assert [reused(first), reused(second)] == [0, 0]  # 5 + 3 chunks: the last chunk of the first is given up
    assert reused(second) == 16 and reused(first) == 32  # now the last chunk of the second is
    assert reused(third) == 0
    assert reused(first) == 40 and reused(second) == 0  # the oldest; its end before its beginning
    small = Prefixes(2 * room)
    batch = batch_of(TINY, params, small)
    assert [run(batch, [first])[0].reused_tokens for _ in range(2)] == [0, 16]  # its beginning is of use alone


def test_over_a_mesh():
    """A row of any part takes what one of another part has left; a device holds its own heads."""
    config = CONFIGS["moe"]
    mesh = sharding.make_mesh(data=1, expert=2, tensor=2, devices=jax.devices()[:4])
    params, layouts = params_of(config), sharding.shardings(
        parameters.abstract(config), parameters.logical_axes(config), mesh
    )  # fmt: skip
    prefixes, how = Prefixes(PLENTY), dict(rows=2, execution=Execution(expert_parallel="gather_tokens"))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, layouts)
        first = run(batch_of(config, params, prefixes, **how), [request(44)])
        asked = [request(44), request(44, 3)]
        expected = run(batch_of(config, params, **how), asked)
        found = run(batch_of(config, params, prefixes, **how), asked)
        assert prefixes.bytes == len(prefixes) * chunk_bytes(config, Execution(), CHUNK, "float32")
    assert [answer.reused_tokens for answer in first + found] == [0, 40, 40]
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.written_at, b.written_at)
        assert np.allclose(a.confidence, b.confidence, rtol=1e-5)


def test_refuses_no_room():
    with pytest.raises(InputError, match="prefix_bytes=0, expected at least 1"):
        Prefixes(0)
