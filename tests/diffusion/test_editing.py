"""Wrong tokens and the loss of editing, against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.attention.visibility import make_layout
from llada_jax.diffusion import noise, objectives
from llada_jax.diffusion.editing import Editing, replace_tokens
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.model.config import preset
from tests.diffusion.test_objectives import TINY, batch_of, keys_of, params_of, prepared, random_ids
from tests.helpers.programs import score

ROWS, LENGTH, BLOCK = 400, 32, 8


def replaced(editing, tokens, barred=(), replaceable=None, seed=0):
    keys = keys_of(len(tokens), seed)
    replaceable = np.ones(tokens.shape, bool) if replaceable is None else replaceable
    layout = make_layout(jnp.ones(tokens.shape, jnp.int32), BLOCK)
    return np.asarray(replace_tokens(keys, jnp.asarray(tokens), jnp.asarray(replaceable), layout, editing, barred))


def test_wrong_tokens_are_uniform_over_the_real_vocabulary_without_the_right_one():
    tokens = np.random.default_rng(0).integers(0, 12, (ROWS, LENGTH)).astype(np.int32)
    editing = Editing(replace_low=1.0, replace_high=1.0, special_ids=(0, 5, 11, 40), vocab_size=10)
    wrong = replaced(editing, tokens, barred=(9, 3))
    allowed = [1, 2, 4, 6, 7, 8]
    for right in range(12):
        of_right = wrong[tokens == right]
        choices = [i for i in allowed if i != right]
        counts = np.bincount(of_right, minlength=12)
        assert set(np.flatnonzero(counts)) == set(choices)
        expected = len(of_right) / len(choices)
        assert (np.abs(counts[choices] - expected) < 5 * np.sqrt(expected)).all()


def test_each_block_has_its_rate_and_only_replaceable_tokens_change():
    tokens = np.full((ROWS, LENGTH), 3, np.int32)
    replaceable = np.random.default_rng(1).random(tokens.shape) < 0.7
    wrong = replaced(Editing(replace_low=0.2, replace_high=0.6, vocab_size=500), tokens, (), replaceable) != 3
    assert not (wrong & ~replaceable).any()
    keys = keys_of(ROWS)
    u = np.asarray(noise.uniform(keys, noise.REPLACING_TIMES, LENGTH)).reshape(ROWS, -1, BLOCK)[..., :1]
    scores = np.asarray(noise.uniform(keys, noise.REPLACING, LENGTH)).reshape(ROWS, -1, BLOCK)
    assert np.array_equal(wrong, (scores < 0.2 + 0.4 * u).reshape(tokens.shape) & replaceable)
    assert wrong.sum() / replaceable.sum() == pytest.approx(0.4, abs=0.02)


def test_a_vocabulary_without_wrong_tokens_is_refused():
    with pytest.raises(InputError, match="1 tokens that are not special"):
        replaced(Editing(replace_high=1.0, vocab_size=3), np.zeros((1, LENGTH), np.int32), barred=(1, 2))


def noised(editing=Editing(), objective=None, rows=8, **others):
    objective = objective or Objective(NoiseSpec(rate_low=0.3, rate_high=0.8), editing=editing, **others)
    return prepared(random_ids(rows, LENGTH), BLOCK, objective=objective), objective


def test_wrong_tokens_lie_among_the_unmasked_and_the_masks_stay_as_they_were():
    plain, _ = noised()
    edited, _ = noised(Editing(weight=0.5, replace_high=0.5))
    assert np.array_equal(plain.hidden, edited.hidden) and np.array_equal(plain.clean, edited.clean)
    differ = np.asarray(edited.noisy != plain.noisy)
    assert differ.any() and not (differ & np.asarray(edited.hidden)).any()
    assert not np.isin(np.asarray(edited.noisy)[differ], [TINY.mask_token_id, *TINY.eos_token_ids]).any()
    assert np.array_equal(edited.masked | edited.unmasked, edited.eligible)


def test_each_of_a_complementary_pair_has_wrong_tokens_in_its_own_gaps():
    example, _ = noised(Editing(weight=1.0, replace_high=1.0), complementary=True)
    first, second = np.split(np.asarray(example.noisy != example.clean) & ~np.asarray(example.hidden), 2)
    assert first.any() and second.any() and not (first & second).any()


@pytest.mark.parametrize("normalizer", ["tokens", "masked"])
@pytest.mark.parametrize("time_weight", ["elbo", "uniform"])
def test_the_loss_is_that_of_the_masked_and_w_times_that_of_the_unmasked(normalizer, time_weight):
    w = 0.7
    example, objective = noised(Editing(weight=w, replace_high=0.5), normalizer=normalizer, time_weight=time_weight)
    params = params_of(TINY)
    sums, scores = score(params, TINY, example)
    everything = example.replace(masked=example.eligible, unmasked=jnp.zeros_like(example.unmasked))
    nll = np.asarray(score(params, TINY, everything)[1].nll, np.float64)  # of the same x_t
    masked = np.asarray(example.hidden & example.eligible)
    unmasked = np.asarray(example.eligible) & ~masked
    weights = 1 / np.asarray(example.rate, np.float64) if time_weight == "elbo" else np.ones(nll.shape)
    if normalizer == "tokens":
        expected = ((nll * weights * masked).sum() + w * (nll * unmasked).sum()) / np.asarray(example.eligible).sum()
    else:
        expected = (nll * weights * masked).sum() / masked.sum() + w * (nll * unmasked).sum() / unmasked.sum()
    value = objectives.loss(sums, objectives.normalizer(example, objective), objective)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    wrong = unmasked & np.asarray(example.noisy != example.clean)
    assert (float(sums.wrong), float(sums.right)) == (wrong.sum(), unmasked.sum() - wrong.sum())
    assert float(sums.nll) == pytest.approx((nll * masked).sum(), rel=1e-5)
    assert float(sums.unmasked_nll) == pytest.approx((nll * unmasked).sum(), rel=1e-5)
    correct = np.asarray(score(params, TINY, everything)[1].correct)
    assert float(sums.wrong_correct) == (correct * wrong).sum()
    assert float(sums.right_correct) == (correct * (unmasked & ~wrong)).sum()


def test_without_weight_wrong_tokens_and_drafts_a_step_is_that_of_sft():
    example, _ = noised()
    other, _ = noised(Editing(weight=0.0, replace_low=0.0, replace_high=0.0, turns=1, draft_share=0.3))
    jax.tree.map(np.testing.assert_array_equal, jax.random.key_data(example.keys), jax.random.key_data(other.keys))
    jax.tree.map(np.testing.assert_array_equal, example.replace(keys=0), other.replace(keys=0))


def test_a_row_without_answer_has_no_loss():
    b = batch_of(random_ids(2, LENGTH))
    supervised = np.zeros_like(b.supervised)
    objective = Objective(normalizer="masked", editing=Editing(weight=1.0, replace_high=0.5))
    arrays = jnp.asarray(b.ids), jnp.asarray(b.segment_ids), jnp.asarray(supervised)
    example = objectives.prepare(*arrays, keys_of(2), BLOCK, TINY, objective)
    sums, _ = score(params_of(TINY), TINY, example)
    assert float(objectives.loss(sums, objectives.normalizer(example, objective), objective)) == 0.0


@pytest.mark.parametrize(
    "values,message",
    [
        ({"weight": -1.0}, "editing.weight=-1.0"),
        ({"turns": 0}, "editing.turns=0"),
        ({"draft_share": 1.5}, "editing.draft_share=1.5"),
        ({"replace_low": 0.5, "replace_high": 0.2}, "editing.replace_low=0.5"),
        ({"threshold_high": float("nan")}, "editing.threshold_high=nan"),
        ({"editing_low": 0.95}, "editing.editing_low=0.95"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Editing(**values)


def test_the_preset_of_a_mixture_takes_it_too():
    config = preset("tiny_moe")
    objective = Objective(editing=dataclasses.replace(Editing(), weight=1.0, replace_high=0.2))
    example = prepared(random_ids(2, 16), 8, config, objective)
    assert np.asarray(example.unmasked).any()
