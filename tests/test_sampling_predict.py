"""Tiled predictions against the whole softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.sampling import predict as predicting
from llada_jax.sampling.predict import Kind, Sampling, predict

ROWS, BLOCK, EMBED, VOCAB, MASK = 4, 3, 8, 50, 17
RNG = np.random.default_rng(0)
HEAD = jnp.asarray(RNG.normal(size=(EMBED, VOCAB)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(ROWS, BLOCK, EMBED)), jnp.float32)
NEEDED = jnp.asarray(RNG.random((ROWS, BLOCK)) < 0.6)


def settings(temperature=0.0, top_k=0, top_p=1.0, seeds=range(ROWS)) -> Sampling:
    full = lambda value, dtype: jnp.full(ROWS, value, dtype)  # noqa: E731
    keys = jax.vmap(functools.partial(jax.random.key, impl="threefry2x32"))(jnp.array(seeds, jnp.uint32))
    return Sampling(full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32), keys)


def run(sampling, kind, hidden=HIDDEN, needed=NEEDED, mesh=None):
    # Nothing is cached between tile sizes: they are read when the function is traced.
    function = jax.jit(lambda *arguments: predict(*arguments, kind))
    if mesh is None:
        return jax.device_get(function(HEAD, hidden, needed, sampling))
    with jax.set_mesh(mesh):
        return jax.device_get(function(HEAD, hidden, needed, sampling))


def distribution(temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """float64 [rows, block, vocab]: temperature, then top-k, then the nucleus; one position at a time, by sorting."""
    z = np.asarray(HIDDEN, np.float64) @ np.asarray(HEAD, np.float64)
    z[..., MASK] = -np.inf
    p = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    for row in p.reshape(-1, VOCAB):
        order = np.argsort(-row)
        row[order[top_k or VOCAB :]] = 0
        row /= row.sum()
        row[order[np.searchsorted(np.cumsum(row[order]), top_p, side="right") + 1 :]] = 0
        row /= row.sum()
    return p


@pytest.mark.parametrize("tile, vocab_tile", [(128, 512), (4, 16), (5, 7)])
def test_argmax_probability_and_entropy_whatever_the_tiles(monkeypatch, tile, vocab_tile):
    monkeypatch.setattr(predicting, "TILE", tile)
    monkeypatch.setattr(predicting, "VOCAB_TILE", vocab_tile)
    p = distribution()
    found = run(settings(), Kind(MASK, entropy=True))
    needed = np.asarray(NEEDED)
    assert np.array_equal(found.token[needed], p.argmax(-1)[needed])
    assert np.allclose(found.confidence[needed], p.max(-1)[needed], rtol=1e-4)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    assert np.allclose(found.entropy[needed], entropy[needed], rtol=1e-3)
    assert not found.token[~needed].any() and not found.confidence[~needed].any()


def test_nothing_needed_costs_nothing_and_gives_nothing():
    found = run(settings(), Kind(MASK), hidden=HIDDEN * jnp.nan, needed=NEEDED & False)
    assert not found.confidence.any()


def test_the_mask_token_is_never_predicted():
    head = HEAD.at[:, MASK].set(100 * HIDDEN[0, 0])
    everything = jnp.ones_like(NEEDED)
    found = jax.jit(lambda: predict(head, HIDDEN, everything, settings(1.0), Kind(MASK, sample=True)))()
    assert not (np.asarray(found.token) == MASK).any()


@pytest.mark.parametrize("cut", [dict(), dict(top_k=5), dict(top_p=0.7), dict(top_k=8, top_p=0.8)])
def test_draws_follow_the_distribution_they_report(cut):
    expected = distribution(temperature=1.5, **cut)
    everything, kind = jnp.ones_like(NEEDED), Kind(MASK, sample=True, cut=bool(cut))
    draws = 400

    def draw(seed):
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), row))(
            jnp.arange(ROWS)
        )
        return predict(HEAD, HIDDEN, everything, settings(1.5, **cut).replace(key=keys), kind)

    found = jax.device_get(jax.jit(jax.vmap(draw))(jnp.arange(draws)))
    at = np.broadcast_to(expected, (draws, *expected.shape))
    probability = np.take_along_axis(at, found.token[..., None], -1)[..., 0]
    assert (probability > 0).all() and np.allclose(found.confidence, probability, rtol=1e-3)
    counts = np.zeros_like(expected)
    for token in found.token:
        counts += np.eye(VOCAB)[token]
    error = np.abs(counts / draws - expected) / np.sqrt(expected * (1 - expected) / draws + 1e-9)
    often = expected * draws > 4
    assert error[often].max() < 4.5 and 0.5 < error[often].mean() < 1.1  # 0.8 of a standard error, give or take


def test_a_draw_does_not_depend_on_tiles_or_on_other_rows(monkeypatch):
    kind = Kind(MASK, sample=True)
    whole = run(settings(1.0), kind)
    monkeypatch.setattr(predicting, "TILE", 5)
    monkeypatch.setattr(predicting, "VOCAB_TILE", 7)
    tiled = run(settings(1.0), kind)
    assert np.array_equal(whole.token, tiled.token)
    backwards = run(settings(1.0, seeds=range(ROWS)[::-1]), kind, HIDDEN[::-1], NEEDED[::-1])
    assert np.array_equal(whole.token, backwards.token[::-1])


def test_argmax_and_draws_share_a_batch():
    temperature = jnp.array([0.0, 1.0, 0.0, 1.0])
    mixed = run(settings().replace(temperature=temperature, top_k=jnp.full(ROWS, 4)), Kind(MASK, True, True))
    greedy, drawn = run(settings(), Kind(MASK)), run(settings(1.0, top_k=4), Kind(MASK, True, True))
    assert np.array_equal(mixed.token[::2], greedy.token[::2])
    assert np.allclose(mixed.confidence[::2], greedy.confidence[::2], rtol=1e-5)  # of all tokens, not of the top 4
    assert np.array_equal(mixed.token[1::2], drawn.token[1::2])


@pytest.mark.parametrize("kind", [Kind(MASK, entropy=True), Kind(MASK, sample=True, cut=True)])
def test_shards_of_the_vocabulary_agree_with_the_whole(kind):
    sampling = settings(1.0 if kind.sample else 0.0, top_k=6, top_p=0.8)
    mesh = sharding.make_mesh(data=4, tensor=2)
    whole, sharded = run(sampling, kind), run(sampling, kind, mesh=mesh)
    needed = np.asarray(NEEDED)
    assert np.array_equal(whole.token, sharded.token)
    assert np.allclose(whole.confidence, sharded.confidence, rtol=1e-4)
    assert np.allclose(whole.entropy[needed], sharded.entropy[needed], rtol=1e-3)
