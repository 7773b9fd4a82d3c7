"""Rates, masks and their keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.attention.visibility import make_layout
from llada_jax.diffusion import noise
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.errors import InputError
from tests.helpers.programs import draw_masking


def draw(spec, rows=64, length=64, block_size=8, segments=None, eligible=None, first=0):
    segments = jnp.ones((rows, length), jnp.int32) if segments is None else segments
    eligible = segments > 0 if eligible is None else eligible
    keys = noise.example_keys(0, jnp.arange(first, first + rows, dtype=jnp.uint32), jnp.zeros(rows, jnp.uint32))
    return draw_masking(keys, eligible, make_layout(segments, block_size), spec)


def test_one_rate_a_block_or_a_document_within_the_band():
    blocks = np.asarray(draw(NoiseSpec(rate_low=0.3, rate_high=0.8)).rate)
    assert 0.3 <= blocks.min() and blocks.max() <= 0.8
    assert (np.ptp(blocks.reshape(64, 8, 8), axis=2) == 0).all()
    assert len(np.unique(blocks[:, ::8])) == 64 * 8
    segments = jnp.asarray(np.repeat([[1, 2]], [64], 0).repeat([20, 44], 1))
    documents = np.asarray(draw(NoiseSpec("sequence"), segments=segments).rate)
    assert (np.ptp(documents[:, :20], axis=1) == 0).all() and (documents[:, 0] != documents[:, 20]).all()


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_a_token_is_masked_at_its_rate(masking):
    masking = draw(NoiseSpec(masking=masking), rows=2000)
    weight = np.where(masking.masked, 1 / np.asarray(masking.rate), 0)
    assert weight.mean() == pytest.approx(1, abs=0.02)  # E[1/t 1(masked)] = 1
    assert np.asarray(masking.masked).mean() == pytest.approx(0.5 if masking else 0, abs=0.07)


def test_fixed_count_masks_uniform_counts_of_eligible_tokens():
    eligible = jnp.asarray(np.random.default_rng(0).random((3000, 16)) < 0.7)
    segments = jnp.ones((3000, 16), jnp.int32)
    m = draw(NoiseSpec(rate_low=0.0, masking="fixed_count"), 3000, 16, 8, segments, eligible)
    assert not (np.asarray(m.masked) & ~np.asarray(eligible)).any()
    for part in (slice(0, 8), slice(8, 16)):
        n = np.asarray(eligible)[:, part].sum(1)
        k = np.asarray(m.masked)[:, part].sum(1)
        assert (k[n > 0] >= 1).all() and (k <= n).all()
        rate = np.asarray(m.rate)[:, part][np.arange(3000), 0]
        np.testing.assert_allclose(rate[n > 0], (k / np.maximum(n, 1))[n > 0], rtol=1e-6)
        counts = np.bincount(k[n == 5], minlength=6)[1:]
        assert counts.min() > 0.6 * counts.mean()


def test_spread_rates_are_even_in_a_row_and_uniform_over_rows():
    rate = np.asarray(draw(NoiseSpec(rate_low=0.0, spread=True), rows=500).rate)[:, ::8]
    spacing = np.diff(np.sort(rate, axis=1), axis=1)
    assert spacing.min() > 0.04 and abs(rate.mean() - 0.5) < 0.01
    assert rate[:, 3].std() == pytest.approx(12**-0.5, rel=0.1)


def test_noise_of_a_row_does_not_depend_on_its_batch():
    whole, part = draw(NoiseSpec(), rows=8), draw(NoiseSpec(), rows=3, first=5)
    assert np.array_equal(whole.masked[5:], part.masked)
    other = noise.example_keys(0, jnp.uint32([5]), jnp.uint32([1]))
    assert not np.array_equal(
        draw_masking(other, jnp.ones((1, 64), bool), make_layout(jnp.ones((1, 64), jnp.int32), 8), NoiseSpec())
        .masked[0],
        whole.masked[5],
    )  # fmt: skip


@pytest.mark.parametrize(
    "values,message",
    [
        ({"times": "token"}, "times"),
        ({"masking": "x"}, "masking"),
        ({"rate_low": 0.9, "rate_high": 0.2}, "rate_low"),
        ({"rate_low": float("nan")}, "rate_low=nan"),
        ({"rate_high": float("nan")}, "rate_high=nan"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        NoiseSpec(**values)


def strata_of(spec, strata, length=64, block_size=8):
    keys = noise.example_keys(0, jnp.arange(4, dtype=jnp.uint32), jnp.zeros(4, jnp.uint32))
    layout = make_layout(jnp.ones((4, length), jnp.int32), block_size)
    eligible = jnp.arange(length)[None] % 5 > 0
    eligible = jnp.broadcast_to(eligible, (4, length))
    return eligible, [draw_masking(keys, eligible, layout, spec, stratum=stratum) for stratum in strata]


def test_strata_share_out_the_band():
    _, found = strata_of(NoiseSpec(rate_low=0.2, rate_high=0.8), [noise.Stratum(i, 3) for i in range(3)])
    for i, masking in enumerate(found):
        assert (masking.rate >= 0.6 - 0.2 * i - 1e-6).all() and (masking.rate <= 0.8 - 0.2 * i + 1e-6).all()


def test_a_mirrored_draw_has_the_complementary_mask_and_rate():
    eligible, (first, second) = strata_of(NoiseSpec(rate_low=0.0), [noise.Stratum(), noise.Stratum(mirrored=True)])
    assert np.array_equal(first.masked ^ second.masked, eligible)
    np.testing.assert_allclose(first.rate + second.rate, 1, atol=1e-6)
    whole = strata_of(NoiseSpec(rate_low=0.0), [None])[1][0]
    assert np.array_equal(whole.masked, first.masked) and np.array_equal(whole.rate, first.rate)


def test_every_use_of_a_rows_key_has_a_key_of_its_own():
    (row,) = noise.example_keys(3, jnp.uint32([7]), jnp.uint32([2]))
    uses = [jax.random.fold_in(row, use) for use in (noise.TIMES, noise.MASKS, noise.EMBEDDING)]
    numbers = np.array([jax.random.uniform(key, (4096,)) for key in uses])
    assert np.abs(np.corrcoef(numbers) - np.eye(3)).max() < 0.06
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in [row, *uses]}) == 4
    # Rates and masks are what they always were: of the two halves of a split.
    split = jax.random.split(row)
    layout = make_layout(jnp.ones((1, 64), jnp.int32), 1)
    drawn = draw_masking(row[None], jnp.ones((1, 64), bool), layout, NoiseSpec(rate_low=0.0))
    np.testing.assert_array_equal(drawn.rate[0], 1 - jax.random.uniform(split[0], (64,)))
    np.testing.assert_array_equal(drawn.masked[0], jax.random.uniform(split[1], (64,)) < drawn.rate[0])
