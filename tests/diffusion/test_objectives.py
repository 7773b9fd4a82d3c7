"""The analytic oracles: what a right mask, weight and alignment must give whatever the weights of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llada_jax
from llada_jax.data.order import Batch
from llada_jax.diffusion import noise, objectives
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.evaluation.likelihood import ESTIMATOR, ar_nll, block_nelbo
from llada_jax.model import parameters
from llada_jax.model.config import preset
from tests.helpers.bayes_exact import bayes_nll, draw_sequences, joint
from tests.helpers.programs import denoised_hidden, prepare, score

TINY = preset("tiny").replace(num_layers=2, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1)
MOE = preset("tiny_moe").replace(num_layers=2, num_dense_layers=0, hidden_size=64)
SHIFTED = TINY.replace(alignment="shifted")


@functools.cache
def params_of(config, scale=3.0):
    params = jax.device_get(parameters.initialize(config, jax.random.key(0)))
    return jax.device_put(jax.tree.map(lambda w: np.float32(scale) * w if w.ndim > 2 else w, params))


def keys_of(rows, seed=0):
    return noise.example_keys(seed, jnp.arange(rows, dtype=jnp.uint32), jnp.zeros(rows, jnp.uint32))


def batch_of(ids, segments=None):
    rows = np.arange(len(ids), dtype=np.uint32)
    segments = np.ones_like(ids) if segments is None else segments
    return Batch(ids, segments, segments > 0, rows, np.zeros_like(rows))


def prepared(ids, block_size, config=TINY, objective=Objective(), segments=None, halves="both", seed=0):
    b = batch_of(np.asarray(ids, np.int32), segments)
    arrays = jnp.asarray(b.ids), jnp.asarray(b.segment_ids), jnp.asarray(b.supervised)
    return prepare(*arrays, keys_of(len(ids), seed), block_size, config, objective, halves)


def random_ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, 500, (rows, length)).astype(np.int32)


# --- A: the uniform model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halves,block_size", [("both", 1), ("both", 8), ("noisy", 64)])
@pytest.mark.parametrize("spec", [NoiseSpec(), NoiseSpec("sequence"), NoiseSpec(rate_low=0.3), ESTIMATOR])
def test_uniform_model_has_nelbo_log_vocab(spec, halves, block_size):
    params = params_of(TINY) | {"head": jnp.zeros((TINY.hidden_size, TINY.vocab_size))}
    total = count = 0
    squares = []
    for seed in range(6):
        example = prepared(random_ids(32, 64), block_size, objective=Objective(spec), halves=halves, seed=seed)
        sums, scores = score(params, TINY, example, halves)
        total, count = total + float(sums.weighted), count + float(sums.eligible)
        squares.append(np.asarray((scores.nll * example.weights).sum(1) / 64))
    stderr = np.std(np.concatenate(squares)) / np.sqrt(6 * 32)
    assert abs(total / count - np.log(TINY.vocab_size)) <= 4.5 * stderr + 1e-4


# --- C: the Bayes-exact denoiser ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("spec", [NoiseSpec(rate_low=0.0), ESTIMATOR])
def test_bayes_exact_model_has_nelbo_equal_to_entropy(block_size, spec):
    p, entropy = joint()
    rows = 60_000
    x = draw_sequences(p, rows)
    config = TINY.replace(vocab_size=512)
    example = prepared(x, block_size, config, Objective(spec))
    nll = bayes_nll(x, np.asarray(example.masked), block_size, p)
    per_row = (nll * np.asarray(example.weights)).sum(1)
    # 1/t is heavy-tailed: the error bar of the Bernoulli estimate is its own.
    assert abs(per_row.mean() - entropy) < 4.5 * per_row.std() / np.sqrt(rows)
    if spec is ESTIMATOR:
        assert per_row.std() < 5


def test_clipped_rates_are_biased_upwards_but_not_at_block_size_1():
    p, entropy = joint()
    x = draw_sequences(p, 60_000)
    for block_size, biased in ((1, False), (4, True)):
        example = prepared(x, block_size, objective=Objective(NoiseSpec(rate_low=0.3, rate_high=0.8)))
        nll = bayes_nll(x, np.asarray(example.masked), block_size, p)
        per_row = (nll * np.asarray(example.weights)).sum(1)
        excess = (per_row.mean() - entropy) / (per_row.std() / np.sqrt(len(x)))
        assert excess > 4 if biased else abs(excess) < 4


# --- D, F and alignment: the two-stream pass against plain passes ---------------------------------------------------


def test_block_size_1_equals_separate_causal_passes():
    """Token i's logits are those of [x_0 .. x_{i-1}, MASK] under a causal mask, read at the mask."""
    params, ids = params_of(TINY), random_ids(1, 12)
    masks = np.full_like(ids, TINY.mask_token_id)
    two_stream = llada_jax.denoise(params, TINY, masks, ids, block_size=1)[0]
    prefixes = np.where(np.arange(12)[:, None] > np.arange(12), ids, TINY.mask_token_id)
    alone = np.asarray(llada_jax.forward(params, TINY, prefixes, mask="causal"))[np.arange(12), np.arange(12)]
    np.testing.assert_allclose(two_stream, alone, atol=2e-5)


@pytest.mark.parametrize("config", [TINY, MOE])
def test_one_block_equals_the_bidirectional_pass(config):
    params, ids = params_of(config), random_ids(2, 24)
    noisy = np.where(np.random.default_rng(0).random(ids.shape) < 0.5, config.mask_token_id, ids)
    two_stream = llada_jax.denoise(params, config, noisy, ids, block_size=24)
    np.testing.assert_allclose(two_stream, llada_jax.forward(params, config, noisy, mask="full"), atol=2e-5)


def test_shifted_block_size_1_is_the_ar_model():
    params, ids = params_of(SHIFTED), random_ids(4, 40)
    masks = np.full_like(ids, SHIFTED.mask_token_id)
    aligned = llada_jax.denoise(params, SHIFTED, masks, ids, block_size=1)
    causal = llada_jax.forward(params, SHIFTED, ids, mask="causal")
    np.testing.assert_allclose(aligned[:, 1:], causal[:, :-1], atol=2e-5)
    batch = batch_of(ids)
    nelbo, ar = block_nelbo(params, SHIFTED, batch, 1), ar_nll(params, SHIFTED, batch)
    assert nelbo.tokens == ar.tokens == 4 * 39
    assert nelbo.nats == pytest.approx(ar.nats, abs=1e-5) and nelbo.stderr == pytest.approx(ar.stderr, abs=1e-5)


def test_shifted_reads_the_noisy_half_inside_a_block_only():
    params, ids = params_of(SHIFTED), random_ids(1, 12)
    noisy = np.where(np.arange(12) % 3 == 0, SHIFTED.mask_token_id, ids)
    aligned = llada_jax.denoise(params, SHIFTED, noisy, ids, block_size=4)
    same = llada_jax.denoise(params, SHIFTED.replace(alignment="same"), noisy, ids, block_size=4)
    clean = llada_jax.forward(params, SHIFTED, ids, mask=("block_causal", 4))
    for i in range(12):
        expected = np.zeros(SHIFTED.vocab_size) if i == 0 else (clean if i % 4 == 0 else same)[0, i - 1]
        np.testing.assert_allclose(aligned[0, i], expected, atol=2e-5)


def test_shifted_reads_the_noisy_half_inside_a_group_of_blocks():
    params, ids = params_of(SHIFTED), random_ids(1, 12)
    objective = Objective(group_blocks=2)
    b = batch_of(ids)
    example = objectives.prepare_batch(b, keys_of(1), 3, SHIFTED, objective, "both")  # row 0, epoch 0: size 2, shift 0
    hidden = {
        alignment: denoised_hidden(params, SHIFTED.replace(alignment=alignment), example.noisy, example.clean,
                                   example.layout, example.positions)
        for alignment in ("shifted", "same")
    }  # fmt: skip
    for i in range(1, 12):
        inside = np.array_equal(hidden["shifted"][0, i], hidden["same"][0, i - 1])
        assert inside == (i % 6 > 0)


# --- E: leaks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, SHIFTED, MOE])
@pytest.mark.parametrize("origin", ["global", "document"])
def test_no_gradient_across_documents_or_from_clean_blocks_at_or_after_ones_own(config, origin):
    """Gradients of a noisy token's hidden state with respect to every input embedding, exactly zero or not."""
    from llada_jax.attention.visibility import block_diffusion, make_layout
    from llada_jax.model.alignment import align
    from llada_jax.model.forward import hidden_states

    length, b = 12, 4
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0]])
    layout = make_layout(segments, b, origin)
    ids = jnp.asarray(random_ids(1, length))
    tokens = jnp.concatenate([jnp.full_like(ids, config.mask_token_id), ids], axis=1)
    positions = jnp.tile(jnp.arange(length)[None] - layout.document_start, (1, 2))

    def hidden(extra):
        h, _ = hidden_states(
            params_of(config), config, tokens, positions, block_diffusion(layout), embedding_noise=extra
        )
        return align(h[:, :length], h[:, length:], layout, config.alignment)[0].sum(-1)

    jacobian = jax.jit(jax.jacobian(hidden))(jnp.zeros((1, 2 * length, config.hidden_size)))[:, 0]
    seen = np.abs(np.asarray(jacobian)).max(-1) > 0
    start, doc = np.asarray(layout.block_start[0]), np.asarray(segments[0])
    for i in range(length):
        noisy, clean = seen[i, :length], seen[i, length:]
        other = doc != doc[i]
        assert not noisy[other].any() and not clean[other].any()
        if doc[i]:
            assert not clean[start[i] :].any(), i
    if config.alignment == "same":
        assert seen[:, :length].any(1).all()


# --- packed documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, SHIFTED, MOE])
@pytest.mark.parametrize("halves,block_size", [("both", 1), ("both", 4), ("noisy", 64)])
def test_packed_documents_have_the_loss_of_the_same_documents_alone(config, halves, block_size):
    params, lengths = params_of(config), (7, 12, 9)
    ids = random_ids(1, 30)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    objective = Objective(block_origin="document")
    packed = prepared(ids, block_size, config, objective, segments, halves)
    _, scores = score(params, config, packed, halves)

    def of_document(x):
        """[1, 30] -> [3, 12]: a document a row."""
        parts = np.split(np.asarray(x)[0, :28], np.cumsum(lengths)[:2])
        return np.stack([np.pad(part, (0, 12 - len(part))) for part in parts])

    alone = prepared(of_document(ids), block_size, config, objective, of_document(segments > 0).astype(int), halves)
    alone = alone.replace(noisy=of_document(packed.noisy), masked=of_document(packed.masked))
    _, expected = score(params, config, alone, halves)
    np.testing.assert_allclose(of_document(scores.nll), np.where(alone.real, expected.nll, 0), atol=1e-5)


# --- H: complementary pairs, and the rest of the loss ---------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 8])
def test_complementary_pair_covers_each_token_once(block_size):
    spec = NoiseSpec(rate_low=0.3, rate_high=0.8)
    example = prepared(random_ids(4, 32), block_size, objective=Objective(spec, complementary=True))
    first, second = np.split(np.asarray(example.masked), 2)
    eligible = np.asarray(example.eligible[:4])
    assert np.array_equal(first ^ second, eligible) and not (first & second).any()
    weights = np.split(np.asarray(example.weights), 2)
    rates = [np.where(m, 1 / np.where(m, w, 1), np.nan) for m, w in zip((first, second), weights, strict=True)]
    assert np.nanmin(rates[0]) >= 0.3 and np.nanmax(rates[0]) <= 0.8
    assert np.nanmin(rates[1]) >= 0.2 and np.nanmax(rates[1]) <= 0.7


def test_without_the_document_mask_a_row_is_one_document():
    ids = random_ids(2, 32)
    segments = np.repeat([[1] * 11 + [2] * 15 + [0] * 6], 2, axis=0).astype(np.int32)
    joined = (segments > 0).astype(np.int32)
    without = prepared(ids, 8, SHIFTED, Objective(document_mask=False), segments)
    one, two = (prepared(ids, 8, SHIFTED, segments=each) for each in (joined, segments))
    for a, b in zip(jax.tree.leaves(without.replace(keys=0)), jax.tree.leaves(one.replace(keys=0)), strict=True):
        assert np.array_equal(a, b)
    params = params_of(SHIFTED)
    losses = [score(params, SHIFTED, each)[1].nll for each in (without, one, two)]
    assert np.array_equal(losses[0], losses[1]) and not np.allclose(losses[0], losses[2])
    assert bool(without.eligible[0, 11]) and not bool(two.eligible[0, 11])  # the first token of the second document


def test_padding_between_documents_does_not_part_them_without_the_mask():
    """The row is one document from its first token to its last; what lies between is seen, and never supervised."""
    ids = random_ids(1, 32)
    segments = np.array([[0] * 2 + [1] * 9 + [0] * 3 + [2] * 8 + [0] + [3] * 4 + [0] * 5], np.int32)
    joined = np.array([[0] * 2 + [1] * 25 + [0] * 5], np.int32)
    for objective in (Objective(document_mask=False), Objective(document_mask=False, block_origin="document")):
        without = prepared(ids, 4, SHIFTED, objective, segments)
        whole = prepared(ids, 4, SHIFTED, Objective(block_origin=objective.block_origin), joined)
        for name in ("segment_ids", "positions", "layout"):
            for a, b in zip(
                jax.tree.leaves(getattr(without, name)), jax.tree.leaves(getattr(whole, name)), strict=True
            ):
                np.testing.assert_array_equal(a, b)
        assert np.array_equal(without.eligible, (segments > 0) & (np.arange(32)[None] > 2))
        assert np.array_equal(without.real, segments > 0)
    batch = batch_of(ids, segments)
    found = block_nelbo(params_of(SHIFTED), SHIFTED, batch, 4, document_mask=False)
    one = batch.replace(segment_ids=joined, supervised=segments > 0)
    assert found == block_nelbo(params_of(SHIFTED), SHIFTED, one, 4)
    assert found.tokens == 20 and found != block_nelbo(params_of(SHIFTED), SHIFTED, batch, 4)


@pytest.mark.parametrize("halves,config", [("both", MOE), ("both", MOE.replace(alignment="shifted")), ("noisy", MOE)])
def test_expert_load_counts_the_tokens_of_documents_in_every_half_and_no_padding(halves, config):
    params, ids = params_of(config), random_ids(3, 24)
    segments = np.array([[1] * 8 + [0] * 4 + [2] * 8 + [0] * 4, [1] * 24, [0] * 24], np.int32)
    for objective in (Objective(block_origin="document"), Objective(block_origin="document", complementary=True)):
        packed = prepared(ids, 4, config, objective, segments, halves)
        sums, _ = score(params, config, packed, halves)
        packed = jax.device_get(packed.replace(keys=packed.real))
        expected = np.zeros_like(sums.expert_load)
        for row in range(len(packed.clean)):
            for document in (1, 2):
                inside = np.flatnonzero(segments[row % 3] == document)
                if len(inside):
                    alone = jax.tree.map(lambda x, row=row, at=inside: x[row : row + 1, at], packed)
                    start = inside[0]
                    alone = alone.replace(layout=jax.tree.map(lambda x, start=start: x - start, alone.layout))
                    expected += np.asarray(score(params, config, alone, halves)[0].expert_load)
        assert np.array_equal(sums.expert_load, expected)
        of_pass = 40 * (2 if halves == "both" else 1) * (2 if objective.complementary else 1) * 4
        if config.alignment == "shifted" or halves == "noisy":  # else the last layer has the noisy half alone
            assert (np.asarray(sums.expert_load).sum(1) == of_pass).all()


def test_padding_turns_no_experts_update():
    params, ids = params_of(MOE), random_ids(8, 64)
    loads = []
    for length in (40, 64):
        segments = (np.arange(length) < 40)[None].repeat(8, 0).astype(np.int32)
        example = prepared(ids[:, :length], 8, MOE, segments=segments)
        example = example.replace(noisy=example.clean)  # longer rows have other noise
        loads.append(np.asarray(score(params, MOE, example)[0].expert_load))
    assert np.array_equal(*loads) and loads[0].sum() > 0


@pytest.mark.parametrize(
    "values",
    [{"confidence_weight": float("nan")}, {"confidence_weight": -1.0}, {"confidence_temperature": float("nan")},
     {"confidence_temperature": float("inf")}, {"confidence_temperature": 0.0}, {"confidence_weight": "1"}],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(values):
    ((name, value),) = values.items()
    with pytest.raises(InputError, match=f"objective.{name}={value!r}, expected "):
        Objective(**values)


def test_clean_half_alone_is_block_size_1():
    params, ids = params_of(SHIFTED), random_ids(3, 20)
    clean, _ = score(params, SHIFTED, prepared(ids, 1, SHIFTED, halves="clean"), "clean")
    both, _ = score(params, SHIFTED, prepared(ids, 1, SHIFTED, Objective(ESTIMATOR)), "both")
    assert float(clean.weighted) == pytest.approx(float(both.weighted), rel=1e-5)


def test_nothing_supervised_is_zero_loss_and_zero_gradient():
    ids = random_ids(2, 16)
    arrays = jnp.asarray(ids), jnp.ones((2, 16), jnp.int32), jnp.zeros((2, 16), bool)
    example = prepare(*arrays, keys_of(2), 4, TINY, Objective())

    def loss(params):
        sums, _ = score(params, TINY, example)
        return sums.weighted / objectives.normalizer(example, Objective())

    value, gradient = jax.jit(jax.value_and_grad(loss))(params_of(TINY))
    assert value == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def test_uniform_weight_and_masked_normalizer():
    ids = random_ids(2, 64)
    objective = Objective(time_weight="uniform", normalizer="masked")
    example = prepared(ids, 8, objective=objective)
    assert set(np.unique(example.weights)) == {0.0, 1.0}
    assert objectives.normalizer(example, objective) == np.asarray(example.masked).sum()


def test_embedding_noise_moves_masked_tokens_only_and_stops_at_zero():
    params, ids = params_of(TINY), random_ids(2, 16)
    example = prepared(ids, 4)
    plain, quiet, loud = (score(params, TINY, example, embedding_noise_std=s)[0] for s in (None, 0.0, 0.5))
    assert plain.weighted == quiet.weighted != loud.weighted
    drawn = objectives._embedding_noise(example, jnp.float32(0.5), 64)
    assert (np.asarray(drawn)[~np.asarray(example.masked)] == 0).all()
    assert np.asarray(drawn)[np.asarray(example.masked)].std() == pytest.approx(0.5, rel=0.05)


# --- CAP (Eq. 6) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_confidence_loss_is_the_mean_entropy_of_correct_tokens_and_moves_nothing_else(temperature):
    params, ids = params_of(TINY, 6.0), np.repeat(random_ids(2, 4), 8, axis=1)
    objective = Objective(confidence_weight=2.0, confidence_temperature=temperature)
    example = prepared(ids, 8, objective=objective)
    # Make some predictions right: the targets of every other masked token become the model's own argmax.
    logits = llada_jax.denoise(params, TINY, np.asarray(example.noisy), ids, block_size=8)
    clean = np.where(np.arange(32)[None] % 2, np.asarray(logits).argmax(-1), ids)
    example = example.replace(clean=jnp.asarray(clean))
    sums, _ = score(params, TINY, example, "noisy", entropy_temperature=temperature)
    two_stream = example.replace(clean=jnp.asarray(ids))
    hidden = denoised_hidden(params, TINY, two_stream.noisy, None, example.layout, example.positions)
    log_p = jax.nn.log_softmax(hidden @ params["head"])
    correct = np.asarray((log_p.argmax(-1) == clean) & example.masked)
    sharpened = np.asarray(jax.nn.log_softmax(log_p / temperature))
    entropy = -(np.exp(sharpened) * sharpened).sum(-1)
    assert correct.any() and float(sums.correct) == correct.sum()
    expected = float(sums.weighted) / 64 + 2.0 * entropy[correct].mean()
    assert float(objectives.loss(sums, jnp.float32(64), objective)) == pytest.approx(expected, rel=1e-4)
    assert float(objectives.loss(sums, jnp.float32(64), Objective())) == pytest.approx(float(sums.weighted) / 64)
