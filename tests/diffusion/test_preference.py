"""DPO on the diffusion ELBO: Eq. 7 and 8 against plain formulas and their exact cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.attention.visibility import make_layout
from llada_jax.diffusion import preference
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.diffusion.preference import Preference
from llada_jax.model import parameters
from llada_jax.model.forward import Execution
from llada_jax.training.step import preference_loss
from tests.diffusion.test_objectives import TINY, batch_of, keys_of, params_of, random_ids
from tests.helpers.programs import draw_masking, score

SEGMENTS = np.repeat([1, 2, 3, 4, 0], [8, 12, 8, 8, 4])[None].repeat(2, 0)
OBJECTIVE = Objective(NoiseSpec(rate_low=0.0, masking="fixed_count"), block_origin="document")


def batch(draw=0):
    b = batch_of(random_ids(2, 40), SEGMENTS)
    layout = make_layout(jnp.asarray(SEGMENTS), 4, "document")
    response = np.arange(40)[None] - np.asarray(layout.document_start) >= 3  # three tokens of prompt
    epochs = np.full(2, draw, np.uint32)
    return jax.tree.map(jnp.asarray, b.replace(supervised=response & (SEGMENTS > 0), epochs=epochs))


def loss_of(settings):
    return preference_loss(TINY, OBJECTIVE, Execution(), 0, settings)


def prepared(loss, draw=0):
    return jax.jit(lambda b: loss.prepare(b, 4, "both"))(batch(draw))


def other_params():
    return jax.tree.map(lambda w: w * 1.05, params_of(TINY))


@pytest.mark.parametrize("times, masking", [("block", "bernoulli"), ("block", "fixed_count"), ("chain", "bernoulli")])
def test_rejected_shares_times_and_masks_with_chosen(times, masking):
    layout = make_layout(jnp.asarray(SEGMENTS), 4, "document")
    source = preference.shared_source(layout, jnp.asarray(SEGMENTS))
    spec = NoiseSpec(times=times, masking=masking)
    masking = draw_masking(keys_of(2), jnp.asarray(SEGMENTS > 0), layout, spec, source)
    for values in (masking.masked, masking.rate):
        values = np.asarray(values)
        assert np.array_equal(values[:, 0:8], values[:, 8:16])
        assert np.array_equal(values[:, 20:28], values[:, 28:36])
        assert not np.array_equal(values[:, 0:8], values[:, 20:28])
    for document in (slice(0, 8), slice(8, 20), slice(20, 28)):
        assert len(np.unique(source[0, document])) == document.stop - document.start


def test_padding_between_documents_does_not_hide_the_chosen_one():
    segments = jnp.asarray(np.repeat([[1, 0, 2]], [5, 3, 7], axis=1))
    source = preference.shared_source(make_layout(segments, 4, "document"), segments)
    assert source[0, 8:15].tolist() == list(range(7))


def test_policy_equal_to_reference_is_log_2_at_every_draw():
    loss, params = loss_of(Preference()), params_of(TINY)
    value = jax.jit(lambda p, r, e: loss.value(p, r, e, loss.total(e), 0.0, "both"))
    example = prepared(loss)
    got, sums = value(params, params, example)
    assert got == jnp.float32(np.log(2)) and sums.difference == 0 and sums.pairs == 4


def test_scores_are_sums_of_weighted_log_likelihoods_and_the_loss_is_equation_8():
    settings = Preference(beta=0.3, draws=3)
    loss, policy, reference = loss_of(settings), other_params(), params_of(TINY)
    example = prepared(loss)
    value, sums = jax.jit(lambda p, r, e: loss.value(p, r, e, loss.total(e), 0.0, "both"))(policy, reference, example)

    def scores(params):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), example.noised)
        nll = np.asarray(score(params, TINY, flat)[1].nll * flat.weights).reshape(2, 3, 40)
        return np.stack([-nll[:, :, SEGMENTS[0] == s].sum(-1).mean(1) for s in (1, 2, 3, 4)], 1)

    gain = scores(policy) - scores(reference)
    difference = np.concatenate([gain[:, 0] - gain[:, 1], gain[:, 2] - gain[:, 3]])
    assert float(value) == pytest.approx(np.log1p(np.exp(-0.3 * difference)).mean(), rel=1e-4)
    metrics = loss.metrics(sums, loss.total(example))
    assert float(metrics["preference_accuracy"]) == (difference > 0).mean()
    assert float(metrics["difference_variance"]) == pytest.approx(difference.var(), rel=1e-2)


def test_unshared_noise_has_mean_zero_and_a_loss_above_log_2():
    """Policy and reference with independent noise: what shared noise avoids."""
    loss, params = loss_of(Preference()), params_of(TINY)

    @jax.jit
    def scores(batch):
        flat = jax.tree.map(lambda x: x[:, 0], loss.prepare(batch, 4, "both").noised)
        nll = score(params, TINY, flat)[1].nll
        return preference.document_scores(nll, flat.weights, flat.segment_ids, 2)

    gain = np.stack([scores(batch(2 * i)) - scores(batch(2 * i + 1)) for i in range(30)])
    difference = (gain[..., 0] - gain[..., 1]).ravel()
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))
    assert np.log1p(np.exp(-0.1 * difference)).mean() > np.log(2)


def test_more_draws_have_less_variance():
    policy, reference, spread = other_params(), params_of(TINY), {}
    for draws in (1, 8):
        loss = loss_of(Preference(draws=draws))

        @jax.jit
        def difference(batch, loss=loss):
            example = loss.prepare(batch, 4, "both")
            return loss.value(policy, reference, example, loss.total(example), 0.0, "both")[1].difference

        spread[draws] = np.var([difference(batch(i)) for i in range(30)])
    assert spread[8] < 0.5 * spread[1]


def test_gradient_raises_the_chosen_and_lowers_the_rejected():
    loss, params = loss_of(Preference(beta=1.0)), parameters.initialize(TINY, jax.random.key(0))
    example = prepared(loss)

    def value(p):
        return loss.value(p, params, example, loss.total(example), 0.0, "both")

    (before, _), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
    after, sums = value(moved)
    assert after < before and sums.difference > 0
