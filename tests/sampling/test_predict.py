"""Tiled predictions against the whole softmax."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.sampling import accept, denoise, levenshtein
from llada_jax.sampling.predict import PredictSettings, Sampling, predict

ROWS, BLOCK, EMBED, VOCAB, MASK = 4, 3, 8, 50, 17
RNG = np.random.default_rng(0)
HEAD = jnp.asarray(RNG.normal(size=(EMBED, VOCAB)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(ROWS, BLOCK, EMBED)), jnp.float32)
NEEDED = jnp.asarray(RNG.random((ROWS, BLOCK)) < 0.6).at[0, 0].set(True)
HEAD = HEAD.at[:, MASK].set(1.02 * HEAD[:, (HIDDEN[0, 0] @ HEAD).argmax()])  # the most probable one there, by a little


def sampling_of(temperature=0.0, top_k=0, top_p=1.0, seeds=range(ROWS)) -> Sampling:
    full = lambda value, dtype: jnp.full(ROWS, value, dtype)  # noqa: E731
    keys = jax.vmap(functools.partial(jax.random.key, impl="threefry2x32"))(jnp.array(seeds, jnp.uint32))
    return Sampling(full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32), keys)


def run(sampling, settings, hidden=HIDDEN, needed=NEEDED, mesh=None, banned=None):
    # Nothing is cached between tile sizes: they are read when the function is traced.
    function = jax.jit(lambda *arguments: predict(*arguments, settings, banned))
    if mesh is None:
        return jax.device_get(function(HEAD, hidden, needed, sampling))
    with jax.set_mesh(mesh):
        return jax.device_get(function(HEAD, hidden, needed, sampling))


def set_vocabulary_tile(monkeypatch, tile):
    monkeypatch.setattr("llada_jax.sampling.predict.VOCAB_TILE", tile)
    monkeypatch.setattr("llada_jax.sampling.predict.LANES", 1)


def distribution(temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """float64 [rows, block, vocab]: temperature, then top-k, then the nucleus; one position at a time, by sorting. The
    mask is a token as any other, but the best other one is never cut.
    """
    z = np.asarray(HIDDEN, np.float64) @ np.asarray(HEAD, np.float64)
    p = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    for row in p.reshape(-1, VOCAB):
        order = np.argsort(-row)
        best = row[other := next(i for i in order if i != MASK)]
        row[order[top_k or VOCAB :]] = 0
        row[order[np.searchsorted(np.cumsum(row[order]), top_p * row.sum(), side="right") + 1 :]] = 0
        row[other] = best
        row /= row.sum()
    return p


def without_mask(p):
    return np.where(np.arange(VOCAB) == MASK, 0, p)


@pytest.mark.parametrize("tile, vocab_tile", [(128, 512), (4, 16), (5, 7)])
def test_argmax_probability_and_entropy_whatever_the_tiles(monkeypatch, tile, vocab_tile):
    monkeypatch.setattr("llada_jax.sampling.predict.TILE", tile)
    set_vocabulary_tile(monkeypatch, vocab_tile)
    p = distribution()
    prediction = run(sampling_of(), PredictSettings(MASK, entropy=True, raw=True))
    needed = np.asarray(NEEDED)
    assert np.array_equal(prediction.token[needed], without_mask(p).argmax(-1)[needed])
    assert np.allclose(prediction.confidence[needed], without_mask(p).max(-1)[needed], rtol=1e-4)
    assert np.array_equal(prediction.mask, (p.argmax(-1) == MASK) & needed) and prediction.mask.any()
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    assert np.allclose(prediction.entropy[needed], entropy[needed], rtol=1e-3)
    assert not prediction.token[~needed].any() and not prediction.confidence[~needed].any()


def test_nothing_needed_costs_nothing_and_gives_nothing():
    prediction = run(sampling_of(), PredictSettings(MASK), hidden=HIDDEN * jnp.nan, needed=NEEDED & False)
    assert not prediction.confidence.any()


@pytest.mark.parametrize("cut", [dict(), dict(top_k=1), dict(top_p=0.01)])
def test_the_mask_token_is_never_predicted(cut):
    head = HEAD.at[:, MASK].set(100 * HIDDEN[0, 0])
    everything, settings = jnp.ones_like(NEEDED), PredictSettings(MASK, sample=True, cut=bool(cut), raw=True)
    prediction = jax.jit(lambda: predict(head, HIDDEN, everything, sampling_of(1.0, **cut), settings))()
    assert not (np.asarray(prediction.token) == MASK).any() and bool(prediction.mask[0, 0])
    best = without_mask(np.asarray(HIDDEN @ head)).argmax(-1)
    assert not cut or prediction.token[0, 0] == best[0, 0]  # nothing but the mask and what stands in for it is left


@pytest.mark.parametrize("cut", [dict(), dict(top_k=5), dict(top_p=0.7), dict(top_k=8, top_p=0.8)])
def test_draws_follow_the_distribution_they_report(cut):
    expected = distribution(temperature=1.5, **cut)
    everything, settings = jnp.ones_like(NEEDED), PredictSettings(MASK, sample=True, cut=bool(cut))
    draws = 400

    def draw(seed):
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), row))(
            jnp.arange(ROWS)
        )
        return predict(HEAD, HIDDEN, everything, sampling_of(1.5, **cut).replace(key=keys), settings)

    prediction = jax.device_get(jax.jit(jax.vmap(draw))(jnp.arange(draws)))
    at = np.broadcast_to(expected, (draws, *expected.shape))
    probability = np.take_along_axis(at, prediction.token[..., None], -1)[..., 0]
    assert (probability > 0).all() and np.allclose(prediction.confidence, probability, rtol=1e-3)
    expected = without_mask(expected)
    expected /= expected.sum(-1, keepdims=True)
    counts = np.zeros_like(expected)
    for token in prediction.token:
        counts += np.eye(VOCAB)[token]
    error = np.abs(counts / draws - expected) / np.sqrt(expected * (1 - expected) / draws + 1e-9)
    often = expected * draws > 4
    assert error[often].max() < 4.5 and 0.5 < error[often].mean() < 1.1  # 0.8 of a standard error, give or take


def test_a_draw_does_not_depend_on_tiles_or_on_other_rows(monkeypatch):
    settings = PredictSettings(MASK, sample=True)
    whole = run(sampling_of(1.0), settings)
    monkeypatch.setattr("llada_jax.sampling.predict.TILE", 5)
    set_vocabulary_tile(monkeypatch, 7)
    tiled = run(sampling_of(1.0), settings)
    assert np.array_equal(whole.token, tiled.token)
    backwards = run(sampling_of(1.0, seeds=range(ROWS)[::-1]), settings, HIDDEN[::-1], NEEDED[::-1])
    assert np.array_equal(whole.token, backwards.token[::-1])


@pytest.mark.parametrize("cut", [dict(), dict(top_k=1), dict(top_p=0.6)])
@pytest.mark.parametrize("mesh", [None, dict(tensor=5)])
def test_banned_tokens_are_passed_over_and_count_in_the_softmax(monkeypatch, cut, mesh):
    set_vocabulary_tile(monkeypatch, 7)
    needed, sampling = np.asarray(NEEDED), sampling_of(1.3, **cut)
    settings = PredictSettings(MASK, sample=True, cut=bool(cut))
    first = run(sampling, settings)
    banned = np.stack([first.token, np.where(np.arange(ROWS) % 2, 3, -1)[:, None].repeat(BLOCK, 1)], axis=-1)
    if mesh:
        mesh = sharding.make_mesh(data=1, **mesh, devices=jax.devices()[:5])
    second = run(sampling, settings, mesh=mesh, banned=jnp.asarray(banned))
    assert not (second.token[..., None] == banned)[needed].any() and not (second.token[needed] == MASK).any()
    probability = np.take_along_axis(distribution(1.3, **cut), second.token[..., None], -1)[..., 0]
    kept = needed & (probability > 0)  # or it stands in, where the cut leaves nothing else
    assert np.allclose(second.confidence[kept], probability[kept], rtol=1e-3) and (second.confidence[needed] > 0).all()
    assert kept.any() or cut == dict(top_k=1)
    if not cut:  # without a draw it is the best that is left
        z = np.asarray(HIDDEN, np.float64) @ np.asarray(HEAD, np.float64)
        greedy = run(sampling_of(), PredictSettings(MASK), banned=jnp.asarray(banned))
        z[..., MASK] = -np.inf
        np.put_along_axis(z, np.where(banned < 0, MASK, banned), -np.inf, axis=-1)
        assert np.array_equal(greedy.token[needed], z.argmax(-1)[needed])


def test_argmax_and_draws_share_a_batch():
    temperature = jnp.array([0.0, 1.0, 0.0, 1.0])
    mixed = run(
        sampling_of().replace(temperature=temperature, top_k=jnp.full(ROWS, 4)), PredictSettings(MASK, True, True)
    )
    greedy, drawn = (
        run(sampling_of(), PredictSettings(MASK)),
        run(sampling_of(1.0, top_k=4), PredictSettings(MASK, True, True)),
    )
    assert np.array_equal(mixed.token[::2], greedy.token[::2])
    assert np.allclose(mixed.confidence[::2], greedy.confidence[::2], rtol=1e-5)  # of all tokens, not of the top 4
    assert np.array_equal(mixed.token[1::2], drawn.token[1::2])


def test_dinfers_probability_is_of_the_logits_as_they_are(monkeypatch):
    set_vocabulary_tile(monkeypatch, 7)
    needed = np.asarray(NEEDED)
    for cut in (dict(), dict(top_k=4)):
        prediction = run(sampling_of(1.7, **cut), PredictSettings(MASK, sample=True, cut=bool(cut), raw=True))
        drawn = run(sampling_of(1.7, **cut), PredictSettings(MASK, sample=True, cut=bool(cut)))
        assert np.array_equal(prediction.token, drawn.token)
        probability = np.take_along_axis(distribution(), prediction.token[..., None], -1)[..., 0]
        assert np.allclose(prediction.confidence[needed], probability[needed], rtol=1e-4)
        of_draw = np.take_along_axis(distribution(1.7, **cut), prediction.token[..., None], -1)[..., 0]
        assert np.allclose(drawn.confidence[needed], of_draw[needed], rtol=1e-4)


SETTINGS = [
    PredictSettings(MASK, entropy=True),
    PredictSettings(MASK, sample=True, cut=True),
    PredictSettings(MASK, sample=True, entropy=True, raw=True),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "mesh", [dict(data=4, tensor=2), dict(fsdp=2, expert=2, tensor=2), dict(expert=4, tensor=1), dict(tensor=5)]
)
def test_parts_of_the_vocabulary_agree_with_the_whole(mesh, settings, monkeypatch):
    """Parts are those of the tensor axis, shared out over the ranks that have rows; 25 columns over 4 of them."""
    set_vocabulary_tile(monkeypatch, 3)
    sampling = sampling_of(1.0 if settings.sample else 0.0, top_k=6, top_p=0.8)
    devices = math.prod(mesh.values())
    mesh = sharding.make_mesh(**{"data": 1} | mesh, devices=jax.devices()[:devices])
    whole, sharded = run(sampling, settings), run(sampling, settings, mesh=mesh)
    needed = np.asarray(NEEDED)
    assert np.array_equal(whole.token, sharded.token) and np.array_equal(whole.mask, sharded.mask)
    assert np.allclose(whole.confidence, sharded.confidence, rtol=1e-4)
    assert np.allclose(whole.entropy[needed], sharded.entropy[needed], rtol=1e-3)


# --- what a rule makes of it ----------------------------------------------------------------------------------------
# Probabilities of tokens 0 .. 6 and of the mask, 7. The mass on the mask makes position 0 unsure of its token by less
# than 0.002; with the mask banned, as if it had no mass, the rule would decide otherwise.

UNSURE = [0.949, 0.0099, 0.0099, 0.0099, 0.0099, 0.0099, 0.0, 0.0015]
SURE = [0.001, 0.98, 0.0038, 0.0038, 0.0038, 0.0038, 0.0038, 0.0]
DOUBTFUL = [0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.0]
MASK_FIRST = [0.0, 0.0, 0.05, 0.45, 0.0, 0.0, 0.0, 0.5]


def step_of(rule, probabilities, **requests):
    """(positions accepted, Prediction) of one step over one block of these probabilities, [block, 8]."""
    logits = np.log(np.asarray(probabilities, np.float32) + np.float32(1e-30))[None]
    everything = np.ones(logits.shape[:2], bool)
    sampling = Sampling(
        np.zeros(1, np.float32), np.zeros(1, np.int32), np.ones(1, np.float32), np.zeros((1, 2), np.uint32)
    )
    settings = PredictSettings(7, entropy=rule == "entropy", raw=rule == "dinfer")
    prediction = jax.jit(predict, static_argnames="settings")(jnp.eye(8), logits, everything, sampling, settings)
    defaults = dict(threshold=0.95, editing_threshold=0.95, entropy_bound=0.1, max_steps=logits.shape[1])
    asked = SimpleNamespace(**{name: jnp.array([value]) for name, value in (defaults | requests).items()})
    decoding = SimpleNamespace(rule=rule, block_length=logits.shape[1])
    accepted = denoise.accepted_by(decoding, asked, everything, jnp.zeros(1, jnp.int32), prediction)
    return np.flatnonzero(accepted[0]).tolist(), jax.device_get(prediction)


def banned(probabilities):
    p = np.asarray(probabilities) * (np.arange(8) < 7)
    return (p / p.sum(-1, keepdims=True)).tolist()


def test_mass_on_the_mask_keeps_a_token_below_the_thresholds_of_levenshtein_editing():
    for block, expected in (([UNSURE, UNSURE, SURE], [2]), (banned([UNSURE, UNSURE, SURE]), [0, 1, 2])):
        prediction = step_of("sglang", block)[1]
        current, masked = jnp.array([[5, 7, 7]]), jnp.array([[False, True, True]])
        requests = SimpleNamespace(max_steps=jnp.array([8]), threshold=jnp.array([0.95]), max_post_steps=jnp.array([9]),
                                   editing_threshold=jnp.array([0.95]), max_steps_per_block=jnp.array([9]))  # fmt: skip
        choice = levenshtein.choose(
            prediction.confidence, prediction.token, current, masked, masked, jnp.ones((1, 3), bool), jnp.array([3]),
            jnp.array([0]), requests,
        )  # fmt: skip
        assert np.flatnonzero(choice.write[0]).tolist() == expected


@pytest.mark.parametrize("rule", ["llada2", "llada2.1", "sglang", "dinfer"])
def test_mass_on_the_mask_keeps_a_token_below_the_threshold(rule):
    block = [UNSURE, SURE]
    accepted, prediction = step_of(rule, block)
    assert accepted == [1] and step_of(rule, banned(block))[0] == [0, 1]
    confidence = prediction.confidence[0, 0]
    assert confidence == pytest.approx(0.949, abs=1e-5) and abs(confidence - 0.95) < 0.002


def test_mass_on_the_mask_keeps_a_written_token_from_an_edit():
    for block, expected in (([UNSURE], []), (banned([UNSURE]), [0])):
        prediction = step_of("llada2.1", block)[1]
        edited = accept.edits(
            prediction.confidence, prediction.token, jnp.array([[5]]), jnp.ones((1, 1), bool), jnp.array([0.95])
        )
        assert np.flatnonzero(edited).tolist() == expected
    prediction = step_of("llada2.1", [MASK_FIRST])[1]  # what stands in for the mask edits by its own probability
    for threshold, current, expected in ((0.44, 5, [0]), (0.46, 5, []), (0.44, 3, [])):
        current, threshold = jnp.array([[current]]), jnp.array([threshold])
        edited = accept.edits(prediction.confidence, prediction.token, current, jnp.ones((1, 1), bool), threshold)
        assert np.flatnonzero(edited).tolist() == expected


def test_entropy_is_of_all_logits():
    block = [UNSURE, SURE, DOUBTFUL]
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in np.asarray(block)]
    of_banned = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in np.asarray(banned(block))]
    bound = sum(entropy[:2]) - 0.001
    assert sum(of_banned[:2]) < bound
    accepted, prediction = step_of("entropy", block, entropy_bound=bound)
    np.testing.assert_allclose(prediction.entropy[0], entropy, rtol=1e-4)
    assert accepted == [0, 1] and step_of("entropy", banned(block), entropy_bound=bound)[0] == [0, 1, 2]


def test_fixed_takes_the_surest_by_all_logits():
    other = [0.9495, 0.0505, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert step_of("fixed", [UNSURE, other])[0] == [1] and step_of("fixed", banned([UNSURE, other]))[0] == [0]


@pytest.mark.parametrize("rule", ["llada2", "llada2.1", "sglang"])
def test_where_the_mask_is_first_another_token_stands_in_with_its_own_probability(rule):
    accepted, prediction = step_of(rule, [MASK_FIRST, DOUBTFUL], threshold=0.42)
    assert accepted == [0] and prediction.token[0, 0] == 3
    assert prediction.confidence[0, 0] == pytest.approx(0.45, abs=1e-5)
    assert step_of(rule, [MASK_FIRST, SURE], threshold=0.46)[0] == [1]


def test_dinfer_leaves_such_a_position_out():
    assert step_of("dinfer", [MASK_FIRST, DOUBTFUL], threshold=0.42)[0] == [1]
    assert step_of("dinfer", [MASK_FIRST, MASK_FIRST], threshold=0.46)[0] == [0, 1]  # or it would never end
