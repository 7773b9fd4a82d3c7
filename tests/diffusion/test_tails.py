"""The tail behind an answer is hidden in the noisy copy with its block, and never scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.data.order import Batch
from llada_jax.diffusion import noise, objectives, preference
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.model.config import preset
from tests.helpers.programs import prepare

TINY = preset("tiny")
LENGTH = 64


def packed(seed=0, rows=16):
    """Rows of two documents and padding: prompt, answer, tail; of some documents no token is supervised."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 500, (rows, LENGTH)).astype(np.int32)
    segments, supervised, tail = (np.zeros((rows, LENGTH), kind) for kind in (np.int32, bool, bool))
    for row in range(rows):
        for segment, start in ((1, 0), (2, 32)):
            size = int(rng.integers(20, 33)) if segment == 2 else 32
            prompt, answer = np.sort(rng.integers(1, size + 1, 2))
            segments[row, start : start + size] = segment
            supervised[row, start + prompt : start + answer] = True
            if answer - prompt > 3:  # a turn of the user's in the middle of the answer
                supervised[row, start + (prompt + answer) // 2] = False
            if supervised[row, start : start + size].any():
                tail[row, start + answer : start + size] = True
    return ids, segments, supervised, tail


def prepared(objective, block=32, config=TINY, halves="both", arrays=None):
    ids, segments, supervised, _ = arrays or packed()
    keys = noise.example_keys(0, jnp.arange(len(ids), dtype=jnp.uint32), jnp.zeros(len(ids), jnp.uint32))
    arrays = (jnp.asarray(each) for each in (ids, segments, supervised))
    return prepare(*arrays, keys, block, config, objective, halves)


def test_tails_are_what_follows_the_last_answer_of_a_document():
    _, segments, supervised, tail = packed()
    found = np.asarray(objectives.tails(jnp.asarray(segments), jnp.asarray(supervised)))
    assert np.array_equal(found, tail) and tail.any() and (found.sum(1) == 0).sum() < len(found)
    assert not np.asarray(objectives.tails(jnp.asarray(segments), jnp.asarray(segments > 0))).any()
    assert not np.asarray(objectives.tails(jnp.asarray(segments), jnp.zeros_like(segments, bool))).any()


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
@pytest.mark.parametrize("times", ["block", "sequence"])
def test_at_full_noise_nothing_of_it_is_seen_and_none_of_it_scored(masking, times):
    ids, segments, supervised, tail = packed()
    objective = Objective(noise=NoiseSpec(times, rate_low=1.0, rate_high=1.0, masking=masking))
    example = jax.device_get(prepared(objective))
    assert (example.noisy[supervised | tail] == TINY.mask_token_id).all()
    assert np.array_equal(example.noisy[~(supervised | tail)], ids[~(supervised | tail)])
    for scored in (example.masked, example.weights > 0):
        assert np.array_equal(scored, supervised)
    assert np.array_equal(example.eligible, supervised)
    assert objectives.normalizer(example, objective) == supervised.sum()
    assert objectives.normalizer(example, Objective(normalizer="masked")) == supervised.sum()


def test_it_is_masked_at_the_rate_of_its_block():
    arrays = tuple(np.concatenate([each] * 40) for each in packed())
    low = prepared(Objective(noise=NoiseSpec(rate_low=0.25, rate_high=0.25)), arrays=arrays)
    share = np.asarray(low.hidden)[arrays[3]].mean()
    assert share == pytest.approx(0.25, abs=0.02)


def test_complementary_copies_hide_each_token_of_it_once():
    _, _, supervised, tail = packed()
    example = jax.device_get(prepared(Objective(complementary=True)))
    first, second = np.split(example.hidden, 2)
    assert np.array_equal(first ^ second, supervised | tail)
    first, second = np.split(example.masked, 2)
    assert np.array_equal(first ^ second, supervised)
    assert not example.weights[np.concatenate([tail, tail])].any()


def test_a_causal_pass_has_no_noisy_copy_of_it():
    _, segments, supervised, tail = packed()
    config = TINY.replace(alignment="shifted")
    example = jax.device_get(prepared(Objective(time_weight="uniform"), 1, config, halves="clean"))
    assert not example.masked[tail].any() and not example.weights[tail].any()


def test_documents_keep_their_tails_when_a_row_is_one_document():
    _, _, supervised, tail = packed()
    objective = Objective(noise=NoiseSpec(rate_low=1.0, rate_high=1.0), document_mask=False)
    example = jax.device_get(prepared(objective))
    assert np.array_equal(example.hidden, supervised | tail) and np.array_equal(example.masked, supervised)


def test_it_gets_the_embeddings_noise_like_every_hidden_token():
    example = prepared(Objective())
    added = np.asarray(objectives._embedding_noise(example, jnp.float32(0.5), 8))
    assert np.array_equal((added != 0).any(-1), np.asarray(example.hidden))


def test_what_has_no_tail_is_masked_as_before():
    """The draws of rows without one do not know of tails: supervised are all tokens, or the last ones of a document."""
    ids, segments, supervised, tail = packed()
    supervised = supervised | tail
    arrays = ids, segments, supervised, None
    example = prepared(Objective(), arrays=arrays)
    keys = noise.example_keys(0, jnp.arange(len(ids), dtype=jnp.uint32), jnp.zeros(len(ids), jnp.uint32))
    drawn = noise.draw_masking(keys, jnp.asarray(supervised), example.layout, NoiseSpec())
    assert np.array_equal(example.hidden, drawn.masked) and np.array_equal(example.masked, drawn.masked)


def test_pairs_hide_the_tails_of_both_answers():
    ids, segments, supervised, tail = packed()
    rows = np.arange(len(ids), dtype=np.uint32)
    batch = Batch(ids, segments, supervised, rows, np.zeros_like(rows))
    objective = Objective(noise=NoiseSpec(rate_low=1.0, rate_high=1.0))
    example = preference.prepare(batch, 0, 32, TINY, objective, preference.Preference(draws=2))
    for draw in range(2):
        assert np.array_equal(example.hidden[:, draw], supervised | tail)
        assert np.array_equal(example.masked[:, draw], supervised)
