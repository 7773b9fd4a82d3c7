"""Scores and gradients of the policy loss on small models: against direct differentiation, and against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llada_jax
from llada_jax.model import parameters
from llada_jax.reinforcement.copies import elbo_copies, trajectory_copies
from llada_jax.reinforcement.policy import PolicyLoss
from llada_jax.reinforcement.rollouts import Rollouts
from llada_jax.reinforcement.scoring import (
    ScoredRows,
    Scoring,
    copy_scores,
    elbo,
    mean_entropy,
    policy_gradient,
    scores,
)

BLOCK, LENGTH = 4, 16
MODEL = llada_jax.preset("tiny").replace(
    vocab_size=32, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16,
    intermediate_size=32, mask_token_id=31, eos_token_id=30, pad_token_id=30,
)  # fmt: skip
PARAMS = parameters.initialize(MODEL, jax.random.key(0))
OLD = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), PARAMS)
SCORING = Scoring(MODEL, BLOCK)


def rollouts(rows: int = 4) -> Rollouts:
    random = np.random.default_rng(0)
    prompt, stop = np.array([3, 4, 6, 1])[:rows], np.array([11, 5, 9, 10])[:rows]
    end = -(-stop // BLOCK) * BLOCK
    steps = np.full((rows, LENGTH), -1, np.int32)
    for row in range(rows):
        steps[row, prompt[row] : end[row]] = random.integers(0, 3, end[row] - prompt[row])
    tokens = random.integers(0, 30, (rows, LENGTH)).astype(np.int32)
    return Rollouts(tokens, prompt, stop, end, steps, np.zeros((rows, LENGTH)), np.ones(rows, np.int32))


def scored_rows(answers: Rollouts, copies, advantage, old=None, reference=None) -> ScoredRows:
    hidden, weights = (np.moveaxis(x, 0, 1) for x in (copies.hidden, copies.weights))
    lengths = answers.answer_tokens.astype(np.float32)
    return ScoredRows(
        answers.tokens, answers.segment_ids, hidden, weights, np.asarray(advantage, np.float32), lengths, old, reference
    )


@pytest.fixture(scope="module")
def trajectory() -> ScoredRows:
    rows = scored_rows(rollouts(), trajectory_copies(rollouts(), BLOCK), [0.5, -1.0, 0.0, 2.0])
    return rows.replace(old=scores(OLD, SCORING, rows), reference=scores(OLD, SCORING, rows))


@pytest.fixture(scope="module")
def ebpo() -> ScoredRows:
    rows = scored_rows(rollouts(), elbo_copies(rollouts(), BLOCK, 3, 0), [0.5, -1.0, 0.0, 2.0])
    return rows.replace(old=elbo(OLD, SCORING, rows), reference=elbo(OLD, SCORING, rows))


def gradient(rows, loss, scoring=SCORING, params=PARAMS):
    return jax.jit(lambda params: policy_gradient(lambda p: p, params, scoring, rows, loss))(params)


def test_scores_are_those_of_denoise(trajectory):
    """Of [x_t | x_0] by the public pass, of the documents up to the end of the last block."""
    got = scores(PARAMS, SCORING, trajectory)
    for copy in range(trajectory.hidden.shape[1]):
        hidden, scored = trajectory.hidden[:, copy], trajectory.weights[:, copy] > 0
        noisy = np.where(hidden, MODEL.mask_token_id, trajectory.tokens)
        logits = llada_jax.denoise(
            PARAMS, MODEL, noisy, trajectory.tokens, block_size=BLOCK, segment_ids=trajectory.segment_ids
        )
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), trajectory.tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(got[:, copy], np.where(scored, logp, 0), atol=2e-5)


def test_temperature_divides_the_logits(trajectory):
    hidden, weights = trajectory.hidden[:, 0], trajectory.weights[:, 0]
    noisy = np.where(hidden, MODEL.mask_token_id, trajectory.tokens)
    logits = llada_jax.denoise(
        PARAMS, MODEL, noisy, trajectory.tokens, block_size=BLOCK, segment_ids=trajectory.segment_ids
    )
    logp = jax.nn.log_softmax(logits / 0.6)
    warm = Scoring(MODEL, BLOCK, temperature=0.6)
    expected = np.where(weights > 0, jnp.take_along_axis(logp, trajectory.tokens[..., None], axis=-1)[..., 0], 0)
    np.testing.assert_allclose(copy_scores(PARAMS, warm, trajectory, hidden, weights)[0], expected, atol=2e-5)
    entropy = -(jnp.exp(logp) * logp).sum(axis=-1)
    mean = entropy[np.asarray(weights > 0)].mean()
    np.testing.assert_allclose(mean_entropy(PARAMS, warm, trajectory), mean, rtol=1e-5)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_trajectory_gradient_is_that_of_the_whole_loss(trajectory, kl_weight):
    loss = PolicyLoss("trajectory", kl_weight=kl_weight, kl_estimator="k3")

    def whole(params):
        logp = scores(params, SCORING, trajectory)
        ratio = jnp.exp(logp - trajectory.old)
        advantage = trajectory.advantage[:, None, None]
        kept = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        kl = jnp.expm1(trajectory.reference - logp) + logp - trajectory.reference
        return (trajectory.weights * (kl_weight * kl - kept)).sum() / len(trajectory.tokens)

    got, sums = gradient(trajectory, loss)
    np.testing.assert_allclose(sums.loss / len(trajectory.tokens), whole(PARAMS), rtol=1e-4)
    expected = ravel_pytree(jax.grad(whole)(PARAMS))[0]
    np.testing.assert_allclose(ravel_pytree(got)[0], expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-7)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_elbo_gradient_is_that_of_the_whole_loss(ebpo, per_token):
    loss = PolicyLoss("elbo", per_token=per_token, kl_weight=0.2)

    def whole(params):
        scale = ebpo.tokens_scored if per_token else 1.0
        log_ratio = (elbo(params, SCORING, ebpo) - ebpo.old) / scale
        cut = jnp.where(ebpo.advantage >= 0, jnp.minimum(log_ratio, jnp.log(1.2)), jnp.maximum(log_ratio, jnp.log(0.8)))
        return (-ebpo.advantage * jnp.exp(cut) + 0.2 * log_ratio**2 / 2).mean()

    got, sums = gradient(ebpo, loss)
    np.testing.assert_allclose(sums.loss / len(ebpo.tokens), whole(PARAMS), rtol=1e-4)
    expected = ravel_pytree(jax.grad(whole)(PARAMS))[0]
    np.testing.assert_allclose(ravel_pytree(got)[0], expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-7)


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_micro_batches_change_nothing(estimator, request):
    rows = request.getfixturevalue("ebpo" if estimator == "elbo" else "trajectory")
    one, two = (gradient(rows, PolicyLoss(estimator), Scoring(MODEL, BLOCK, micro_batches=n)) for n in (1, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_rows_without_advantage_may_be_left_out(estimator, request):
    rows = request.getfixturevalue("ebpo" if estimator == "elbo" else "trajectory").replace(reference=None)
    chosen = np.array([0, 1, 3])  # the third has none
    fewer = jax.tree.map(lambda x: x[chosen], rows)
    loss = PolicyLoss(estimator)
    got = jax.jit(lambda params: policy_gradient(lambda p: p, params, SCORING, fewer, loss, answers=4)[0])(PARAMS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient(rows, loss)[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_one_update_from_equal_policies_has_ratio_one(estimator, request):
    rows = request.getfixturevalue("ebpo" if estimator == "elbo" else "trajectory")
    score = jax.jit(lambda params, rows: (elbo if estimator == "elbo" else scores)(params, SCORING, rows))
    rows = rows.replace(old=score(PARAMS, rows), reference=None)
    _, sums = gradient(rows, PolicyLoss(estimator))
    assert sums.ratio == sums.count and sums.clipped == 0


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_without_old_scores_the_policy_is_its_own(estimator, kl_weight, request):
    """The gradient of a first update, without its passes for the old scores."""
    rows = request.getfixturevalue("ebpo" if estimator == "elbo" else "trajectory")
    rows = rows if kl_weight else rows.replace(reference=None)
    score = jax.jit(lambda params, rows: (elbo if estimator == "elbo" else scores)(params, SCORING, rows))
    loss = PolicyLoss(estimator, kl_weight=kl_weight)
    expected, _ = gradient(rows.replace(old=score(PARAMS, rows)), loss)
    got, sums = gradient(rows.replace(old=None), loss)
    assert sums.ratio == sums.count and sums.log_ratio == 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["elbo", "trajectory"])
def test_no_advantage_or_no_scored_token_is_no_gradient(estimator, request):
    rows = request.getfixturevalue("ebpo" if estimator == "elbo" else "trajectory")
    nothing = jnp.zeros_like(rows.old)
    for still in (
        rows.replace(advantage=np.zeros(4, np.float32)),
        rows.replace(weights=jnp.zeros_like(rows.weights), old=nothing, tokens_scored=np.zeros(4, np.float32)),
    ):
        gradients, sums = gradient(still, PolicyLoss(estimator, per_token=True))
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))
        assert np.isfinite(sums.loss)


def test_the_elbo_gradient_is_the_expectation_over_all_masks():
    """At ratio 1 the gradient is -A dE. The mean over many copies against all masks of every size, each size equally
    likely, weighted by n / m: within four standard errors.
    """
    answers = rollouts(1)
    begin, end = int(answers.prompt_length[0]), int(answers.stop_length[0])
    bounds = [(max(b, begin), min(b + BLOCK, end)) for b in range(begin // BLOCK * BLOCK, end, BLOCK)]
    tail = np.zeros(LENGTH, bool)
    tail[end : answers.replay_length[0]] = True
    masks, weights = [], []
    for first, last in bounds:
        n = last - first
        for m in range(1, n + 1):
            chosen = list(itertools.combinations(range(first, last), m))
            for places in chosen:
                hidden = tail.copy()
                hidden[list(places)] = True
                masks.append(hidden)
                weights.append(np.where(hidden & ~tail, 1 / n / len(chosen) * n / m, 0))
    exact = scored_rows(answers, elbo_copies(answers, BLOCK, 1, 0), [1.0]).replace(
        hidden=np.array(masks)[None], weights=np.array(weights, np.float32)[None]
    )
    of_elbo = jax.jit(lambda rows: ravel_pytree(jax.grad(lambda p: elbo(p, SCORING, rows).sum())(PARAMS))[0])
    expected = np.asarray(of_elbo(exact))

    draws = np.array([
        of_elbo(scored_rows(answers, elbo_copies(answers, BLOCK, 4, (5, i)), [1.0])) for i in range(150)
    ])  # fmt: skip
    largest = np.argsort(-np.abs(expected))[:200]
    error = (draws.std(axis=0, ddof=1) / np.sqrt(len(draws)))[largest]
    assert (np.abs(draws.mean(axis=0) - expected)[largest] / error).max() < 4
    assert (np.abs(0.1 * expected[largest]) / error).max() > 4  # a tenth more or less would be seen

    rows = scored_rows(answers, elbo_copies(answers, BLOCK, 4, (5, 0)), [1.0])
    got, _ = gradient(rows.replace(old=elbo(PARAMS, SCORING, rows)), PolicyLoss())
    np.testing.assert_allclose(ravel_pytree(got)[0], -draws[0], atol=1e-4 * np.abs(draws[0]).max())
