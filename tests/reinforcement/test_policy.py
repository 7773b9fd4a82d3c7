"""The policy loss and the copies, against numpy written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.reinforcement.copies import elbo_copies, trajectory_copies
from llada_jax.reinforcement.policy import PolicyLoss, advantages, kl_of, sequence_loss, token_loss
from llada_jax.reinforcement.rollouts import Rollouts

BLOCK, LENGTH = 4, 24


def rollouts(seed: int = 0, rows: int = 6) -> Rollouts:
    """Prompts that cut a block, answers that end inside one, an answer of one token, replays with unwritten tokens."""
    random = np.random.default_rng(seed)
    prompt = random.integers(1, 9, rows)
    stop = prompt + random.integers(1, 12, rows)
    stop[0] = prompt[0] + 1
    end = -(-stop // BLOCK) * BLOCK
    steps = np.full((rows, LENGTH), -1, np.int32)
    for row in range(rows):
        steps[row, prompt[row] : end[row]] = random.integers(0, 5, end[row] - prompt[row])
        steps[row, stop[row] : end[row]] = random.integers(-1, 5, end[row] - stop[row])
    tokens = random.integers(0, 500, (rows, LENGTH)).astype(np.int32)
    return Rollouts(tokens, prompt, stop, end, steps, random.random((rows, LENGTH)), np.ones(rows, np.int32))


def blocks_of(begin: int, end: int):
    """(first, last + 1) of each block's part of [begin, end)."""
    return [(max(b, begin), min(b + BLOCK, end)) for b in range(begin // BLOCK * BLOCK, end, BLOCK)]


@pytest.mark.parametrize("kind", ["mean", "std", "leave_one_out"])
def test_advantages_equal_their_definitions(kind):
    rewards = np.random.default_rng(0).random((3, 5))
    for group, got in zip(rewards, advantages(rewards, kind), strict=True):
        others = [np.mean([x for j, x in enumerate(group) if j != i]) for i in range(5)]
        expected = group - (others if kind == "leave_one_out" else group.mean())
        np.testing.assert_allclose(got, expected / (group.std() if kind == "std" else 1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "std", "leave_one_out"])
def test_equal_rewards_have_no_advantage(kind):
    assert (advantages(np.full((2, 7), 0.1), kind) == 0).all()


def test_a_group_of_one_and_an_unknown_advantage_are_refused():
    with pytest.raises(InputError, match="groups of 1"):
        advantages(np.ones((4, 1)), "mean")
    with pytest.raises(InputError, match="rl.advantage='rank'"):
        advantages(np.ones((4, 2)), "rank")


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_sequence_loss_equals_its_equation(per_token, estimator):
    random = np.random.default_rng(1)
    now, old, reference, advantage = random.normal(size=(4, 9)).astype(np.float32)
    length = random.integers(1, 9, 9).astype(np.float32)
    settings = PolicyLoss("elbo", 0.1, 0.3, per_token, 0.7, estimator)
    expected, clipped = 0.0, 0
    for e, o, r, a, n in zip(now, old, reference, advantage, length, strict=True):
        scale = n if per_token else 1
        log_ratio, d = (e - o) / scale, (e - r) / scale
        cut = min(log_ratio, np.log(1.3)) if a >= 0 else max(log_ratio, np.log(0.9))
        kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]
        expected += -a * np.exp(cut) + 0.7 * kl
        clipped += cut != log_ratio
    sums = sequence_loss(now, old, reference, advantage, length, settings)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    assert sums.clipped == clipped and sums.count == 9


def test_the_token_loss_equals_its_equation():
    random = np.random.default_rng(2)
    now, old, reference = random.normal(size=(3, 4, 6)).astype(np.float32)
    now[0, 0] = 99.0  # its log ratio is cut to 10
    weights = np.where(random.random((4, 6)) < 0.5, random.random((4, 6)), 0).astype(np.float32)
    weights[0, 0] = 0.5
    advantage = random.normal(size=4).astype(np.float32)
    settings = PolicyLoss("trajectory", 0.2, 0.2, kl_weight=0.01, kl_estimator="k3")
    expected, clipped = 0.0, 0
    for i, j in zip(*np.nonzero(weights), strict=True):
        ratio, a = np.exp(np.clip(now[i, j] - old[i, j], -10, 10)), advantage[i]
        d = np.clip(now[i, j] - reference[i, j], -10, 10)
        kept = min(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        expected += weights[i, j] * (-kept + 0.01 * (np.exp(-d) - 1 + d))
        clipped += kept < ratio * a
    sums = token_loss(now, old, reference, advantage, weights, settings)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    assert sums.clipped == clipped and sums.count == (weights > 0).sum()


def test_equal_policies_have_ratio_one_and_no_clip():
    now = np.random.default_rng(3).normal(size=(3, 5)).astype(np.float32)
    weights = np.ones((3, 5), np.float32)
    tokens = token_loss(now, now, now, np.ones(3), weights, PolicyLoss("trajectory", kl_weight=1.0))
    answers = sequence_loss(now[0], now[0], now[0], np.ones(5), np.ones(5), PolicyLoss(kl_weight=1.0))
    for sums in (tokens, answers):
        assert sums.ratio == sums.count and sums.clipped == 0 and sums.kl == 0 and sums.log_ratio == 0


def test_a_clipped_answer_has_no_gradient():
    loss = PolicyLoss("elbo", 0.2, 0.2)

    def slope(difference, advantage):
        def value(e):
            return sequence_loss(e, jnp.zeros(1), None, jnp.array([advantage]), jnp.ones(1), loss).loss

        return jax.grad(value)(jnp.array([difference]))[0]

    assert slope(0.5, 1.0) == 0 and slope(-0.5, -1.0) == 0
    assert slope(-0.5, 1.0) < 0 < slope(0.5, -1.0)


def test_kl_estimators_are_zero_at_equality_and_the_last_two_are_positive():
    d = jnp.array([-2.0, 0.0, 3.0])
    assert all(kl_of(d, name)[1] == 0 for name in ("k1", "k2", "k3"))
    assert all((kl_of(d, name)[jnp.array([0, 2])] > 0).all() for name in ("k2", "k3"))


@pytest.mark.parametrize("seed", range(4))
def test_elbo_copies_equal_their_definition(seed):
    answers = rollouts(seed)
    copies = elbo_copies(answers, BLOCK, 5, (7, seed))
    levels = []
    for n in range(5):
        cells = []
        for row in range(len(answers.tokens)):
            begin, end = answers.prompt_length[row], answers.stop_length[row]
            for number, (first, last) in enumerate(blocks_of(begin, end)):
                masked = copies.weights[n, row, first:last] > 0
                m, size = int(masked.sum()), last - first
                assert 1 <= m <= size
                assert (copies.hidden[n, row, first:last] == masked).all()
                np.testing.assert_allclose(copies.weights[n, row, first:last][masked], size / m / 5, rtol=1e-6)
                cells.append((number, row, m, size))
            assert copies.hidden[n, row, end : answers.replay_length[row]].all()  # behind the answer: hidden
            outside = np.r_[0:begin, answers.replay_length[row] : LENGTH]
            assert not copies.hidden[n, row, outside].any()
            assert not copies.weights[n, row, np.r_[0:begin, end:LENGTH]].any()
        cells.sort(key=lambda cell: cell[:2])
        # Some offset gives every cell its count: floor(u size) + 1 = m, so u lies in [(m - 1) / size, m / size).
        offsets = np.linspace(0, 1, 20_001)
        u = (offsets[:, None] + np.arange(len(cells)) / len(cells)) % 1
        m, size = (np.array([cell[i] for cell in cells]) for i in (2, 3))
        assert (np.minimum(np.floor(u * size) + 1, size) == m).all(axis=1).any()
        levels.append(tuple(m))
    assert len(set(levels)) > 1


def test_elbo_copies_mask_each_token_with_its_rate():
    """Over many copies, the expected weight of every answer token is 1 / copies."""
    answers = rollouts(1)
    copies = elbo_copies(answers, BLOCK, 4000, 0)
    mean = copies.weights.sum(axis=0)
    np.testing.assert_allclose(mean[answers.in_answer], 1, atol=0.12)


def test_copies_are_a_function_of_the_seed():
    one, same, other = (elbo_copies(rollouts(), BLOCK, 3, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(one.hidden, same.hidden)
    assert (one.hidden != other.hidden).any()


@pytest.mark.parametrize("shrink", [1, 2, 9])
@pytest.mark.parametrize("weighting", ["answer", "step"])
def test_trajectory_copies_replay_the_sampler(shrink, weighting):
    answers = rollouts(2)
    copies = trajectory_copies(answers, BLOCK, shrink, weighting)
    for row in range(len(answers.tokens)):
        steps = answers.steps[row]
        rounds = np.full(LENGTH, -1)
        for first, last in blocks_of(answers.prompt_length[row], answers.replay_length[row]):
            distinct = sorted({s for s in steps[first:last] if s >= 0})
            for i in range(first, last):
                if steps[i] >= 0:
                    rounds[i] = distinct.index(steps[i]) // shrink
        written = rounds >= 0
        groups = {(i // BLOCK, rounds[i]) for i in np.nonzero(written)[0]}
        for n in range(len(copies.hidden)):
            unwritten = answers.in_replay[row] & ~written
            np.testing.assert_array_equal(copies.hidden[n, row], (written & (rounds >= n)) | unwritten)
            for i in range(LENGTH):
                expected = 0.0
                if rounds[i] == n:
                    mates = sum(rounds[j] == n for j in range(i // BLOCK * BLOCK, (i // BLOCK + 1) * BLOCK))
                    expected = 1 / written.sum() if weighting == "answer" else 1 / mates / len(groups)
                np.testing.assert_allclose(copies.weights[n, row, i], expected, rtol=1e-6)
    assert (copies.scored.sum(axis=0) == (answers.steps >= 0)).all()


def test_trajectory_copies_are_padded_with_empty_ones():
    copies = trajectory_copies(rollouts(), BLOCK, copies=12)
    assert len(copies.hidden) == 12 and not copies.weights[8:].any()
    with pytest.raises(InputError, match="rl.token_weights='all'"):
        trajectory_copies(rollouts(), BLOCK, weighting="all")
