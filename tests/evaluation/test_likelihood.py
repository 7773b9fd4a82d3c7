"""Estimators of the NELBO against theory: exact expectations and variances, by enumeration, of a Bayes-exact model."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.data.order import Batch
from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.evaluation import likelihood
from llada_jax.evaluation.likelihood import Draws
from llada_jax.model import parameters
from llada_jax.model.config import preset
from tests.helpers.bayes_exact import LENGTH, SEQUENCES, VOCAB, bayes_nll, draw_sequences, joint

TINY = preset("tiny").replace(num_layers=1, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1)
P, ENTROPY = joint()
noised = jax.jit(likelihood.draw_example, static_argnums=(0, 1, 2))
MASKS = np.array(list(itertools.product([False, True], repeat=LENGTH)))


def batch_of(ids):
    rows = np.arange(len(ids), dtype=np.uint32)
    ones = np.ones(ids.shape, np.int32)
    return Batch(ids.astype(np.int32), ones, ones > 0, rows, np.zeros_like(rows))


@functools.cache
def nll_table(block_size):
    """bayes_nll of each of SEQUENCES under each of MASKS, [sequences, masks, LENGTH]."""
    x, masked = np.repeat(SEQUENCES, len(MASKS), axis=0), np.tile(MASKS, (len(SEQUENCES), 1))
    return bayes_nll(x, masked, block_size, P).reshape(len(SEQUENCES), len(MASKS), LENGTH)


def bayes_values(x, block_size, draws, seed=0):
    """row_nelbo of the Bayes-exact model."""
    objective = Objective(noise=draws.spec)
    sequence = x @ VOCAB ** np.arange(LENGTH)[::-1]

    def score(batch, key, part):
        example = noised(TINY, objective, "both", block_size, seed, batch, key, part)
        nll = nll_table(block_size)[sequence, np.asarray(example.masked) @ 2 ** np.arange(LENGTH)[::-1]]
        return jnp.asarray((nll * np.asarray(example.weights)).sum(1)), example.eligible.sum(1)

    return likelihood.over_draws(score, batch_of(x), draws, len(x))


def one_block_values(x):
    """{mask: nats of x under it, weighted by n / k} of all masks of a block of LENGTH tokens."""
    nll = nll_table(LENGTH)[x @ VOCAB ** np.arange(LENGTH)[::-1]].sum(-1)
    return {tuple(mask): LENGTH / sum(mask) * value for mask, value in zip(MASKS, nll, strict=True) if any(mask)}


def theory(x, draws):
    """Exact (expectation, variance) of the estimate of x: fixed counts in one block."""
    values = one_block_values(x)
    by_count = [[v for mask, v in values.items() if sum(mask) == k] for k in range(1, LENGTH + 1)]
    mean = np.mean([np.mean(group) for group in by_count])
    if draws.times == "stratified":
        assert draws.samples % LENGTH == 0  # then each part of the band is of one count
        return mean, np.mean([np.var(group) for group in by_count]) / draws.samples
    if draws.times == "independent":
        square = np.mean([np.mean(np.square(group)) for group in by_count])
        return mean, (square - mean**2) / draws.samples
    pairs = []
    for order in itertools.permutations(range(LENGTH)):
        for k in range(1, LENGTH + 1):
            first = tuple(i in order[:k] for i in range(LENGTH))
            second = tuple(i in order[k - 1 :] for i in range(LENGTH))  # the n + 1 - k of the highest scores
            pairs.append((values[first] + values[second]) / 2)
    return mean, np.var(pairs) / (draws.samples // 2)


@pytest.mark.parametrize("times", likelihood.TIMES)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_unbiased_and_the_standard_error_over_rows_is_right(times, block_size):
    x = draw_sequences(P, 20_000)
    values, counts = bayes_values(x, block_size, Draws(2, times))
    found = likelihood.summarize(values, counts)
    assert found.tokens == x.size
    assert abs(found.nats - ENTROPY / LENGTH) < 4.5 * found.stderr
    parts = [likelihood.summarize(v, counts[:100]) for v in np.split(values, 200)]
    spread = np.std([part.nats for part in parts])
    assert np.mean([part.stderr for part in parts]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("times", likelihood.TIMES)
def test_variances_are_those_of_theory(times):
    """Of one sequence, over draws; and noise_stderr, which sees a few repeats only, estimates it."""
    x, draws = draw_sequences(P, 1, seed=3), Draws(4, times, repeats=6)
    mean, variance = theory(x[0], draws)
    values, counts = bayes_values(np.repeat(x, 4000, axis=0), LENGTH, draws)
    assert values.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / values.size))
    assert values.var() == pytest.approx(variance, rel=0.08)
    rows = likelihood.summarize(values[:300], counts[:300])
    assert rows.noise_stderr == pytest.approx(math.sqrt(variance / 6 / 300) / LENGTH, rel=0.15)


def test_stratified_and_antithetic_draws_vary_less():
    """Stratified ones for every sequence, antithetic ones on average: for some their two values rise together."""
    plain, stratified, antithetic = (
        np.array([theory(x, Draws(4, times))[1] for x in SEQUENCES])
        for times in ("independent", *likelihood.TIMES[:0:-1])
    )
    assert (stratified < plain).all()
    assert stratified @ P < 0.5 * (plain @ P) and antithetic @ P < 0.7 * (plain @ P)


def test_bernoulli_masks_agree_but_vary_more():
    x = draw_sequences(P, 20_000)
    plain, fixed = (
        likelihood.summarize(*bayes_values(x, LENGTH, Draws(2, "independent", masking)))
        for masking in ("bernoulli", "fixed_count")
    )
    assert abs(plain.nats - fixed.nats) < 4.5 * math.hypot(plain.stderr, fixed.stderr)
    assert plain.stderr > 1.5 * fixed.stderr


def test_full_sequence_is_one_block_without_a_clean_half():
    params = parameters.initialize(TINY, jax.random.key(0))
    batch = batch_of(np.random.default_rng(0).integers(0, 500, (3, 16)))
    common = dict(samples=2, rows_at_once=2)
    whole = likelihood.block_nelbo(params, TINY, batch, None, **common)
    assert whole.nats == pytest.approx(likelihood.block_nelbo(params, TINY, batch, 16, **common).nats, rel=1e-5)
    assert whole.noise_stderr is None and whole.tokens == 48
    # At block size 1 there is no noise: repeats agree.
    exact = likelihood.block_nelbo(params, TINY, batch, 1, repeats=2, **common)
    assert exact.noise_stderr == pytest.approx(0, abs=1e-6)


def test_estimates_do_not_depend_on_how_many_rows_go_at_once():
    params = parameters.initialize(TINY, jax.random.key(0))
    batch = batch_of(np.random.default_rng(0).integers(0, 500, (5, 16)))
    draws = Draws(2, "antithetic", repeats=2)
    values = [likelihood.row_nelbo(params, TINY, batch, 4, draws, rows_at_once=n)[0] for n in (2, 5)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_the_mean_over_components_is_weighted_by_their_shares():
    found = likelihood.weighted_mean(
        [likelihood.Estimate(2.0, 0.3, 10), likelihood.Estimate(4.0, 0.4, 20)], [0.75, 0.25]
    )
    assert (found.nats, found.tokens) == (2.5, 30)
    assert found.stderr == pytest.approx(math.hypot(0.225, 0.1))


@pytest.mark.parametrize(
    "draws, message",
    [
        (dict(times="even"), "times='even'"),
        (dict(samples=0), "samples=0"),
        (dict(samples=3, times="antithetic"), "samples=3: antithetic"),
        (dict(masking="x"), "masking='x'"),
    ],
)
def test_bad_draws_are_named(draws, message):
    with pytest.raises(InputError, match=message):
        Draws(**draws).spec  # noqa: B018


def test_block_size_1_is_exact_and_drawn_once(monkeypatch):
    params = parameters.initialize(TINY, jax.random.key(0))
    batch = batch_of(np.random.default_rng(0).integers(0, 500, (4, 8)))
    passes = []
    real = likelihood._row_sums
    monkeypatch.setattr(likelihood, "_row_sums", lambda *arguments: passes.append(1) or real(*arguments))
    found = {
        times: likelihood.block_nelbo(params, TINY, batch, 1, samples=samples, times=times)
        for times, samples in (("stratified", 1), ("stratified", 4), ("antithetic", 2), ("independent", 3))
    }
    assert len(set(estimate.nats for estimate in found.values())) == 1 and len(passes) == 4


def test_one_row_has_no_standard_error():
    one = likelihood.summarize(np.array([[3.0], [0.0]]), np.array([2, 0]))  # the second row is padding
    assert one.nats == 1.5 and one.stderr is None
    two = likelihood.summarize(np.array([[3.0], [2.0]]), np.array([2, 2]))
    assert two.stderr == pytest.approx(0.25)  # of 1.5 and 1.0 nats per token
    assert likelihood.weighted_mean([one, two], [0.5, 0.5]).stderr is None


def test_perplexity_beyond_floats_is_infinite():
    found = likelihood.estimate_fields(likelihood.Estimate(800.0, None, 3), 7)
    assert found["perplexity"] == math.inf and found["stderr"] is None and found["bits_per_byte"] > 0
    assert likelihood.estimate_fields(likelihood.Estimate(2.0, 0.1, 3), None)["perplexity"] == pytest.approx(
        math.exp(2)
    )
