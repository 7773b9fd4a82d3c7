"""Drafts of training against the decoder's own rules, and against OPUT read literally."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llada_jax
from llada_jax.attention.visibility import make_layout
from llada_jax.diffusion import noise, objectives
from llada_jax.diffusion.drafts import accepted, draft
from llada_jax.diffusion.editing import Editing
from llada_jax.diffusion.groups import Groups, grouped
from llada_jax.diffusion.levenshtein import labels
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.model import head
from llada_jax.model.forward import Execution
from llada_jax.sampling import accept
from tests.diffusion.test_objectives import MOE, SHIFTED, TINY, keys_of, params_of, prepared, random_ids
from tests.helpers.programs import score

ROWS, LENGTH, BLOCK = 3, 24, 8
drafted = jax.jit(draft, static_argnames=("config", "objective", "halves", "execution"))


def test_a_draft_accepts_what_the_decoder_accepts():
    rng = np.random.default_rng(0)
    confidence = rng.integers(0, 8, (200, LENGTH)) / np.float32(8)  # with ties
    masked = rng.random((200, LENGTH)) < 0.6
    threshold = rng.random((200, 1)).astype(np.float32)
    layout = make_layout(jnp.ones((200, LENGTH), jnp.int32), BLOCK)
    found = np.asarray(jax.jit(accepted)(confidence, masked, threshold, layout)).reshape(-1, BLOCK)
    of_decoder = accept.sglang(
        jnp.asarray(confidence.reshape(-1, BLOCK)), jnp.asarray(masked.reshape(-1, BLOCK)),
        jnp.asarray(np.repeat(threshold[:, 0], LENGTH // BLOCK)),
    )  # fmt: skip
    assert np.array_equal(found, of_decoder)


def test_of_a_group_only_the_first_block_must_accept():
    layout = make_layout(jnp.ones((1, LENGTH), jnp.int32), BLOCK)
    layout = grouped(layout, Groups(jnp.int32([2]), jnp.int32([0])), jnp.ones((1, LENGTH), bool))
    confidence = jnp.linspace(0.1, 0.8, LENGTH)[None]
    found = jax.jit(accepted)(confidence, jnp.ones((1, LENGTH), bool), jnp.full((1, 1), 0.9), layout)
    assert np.flatnonzero(np.asarray(found)).tolist() == [BLOCK - 1, LENGTH - 1]


PACKED = np.repeat([[1] * 10 + [2] * 11 + [0] * 3], ROWS, axis=0)
EDGES = {"one document": [0, 8, 16, 24], "packed": [0, 8, 10, 16, 21]}


def by_hand(params, config, example, editing, rows_are):
    """x_t after each turn, from the logits of the public pass and the decoder's rules, block by block."""
    coin, u, v = np.asarray(noise.uniform(example.keys, noise.DRAFTS, 3)).T
    threshold = editing.threshold_low + (editing.threshold_high - editing.threshold_low) * u
    editing_threshold = editing.editing_low + (editing.editing_high - editing.editing_low) * v
    noisy, hidden = np.array(example.noisy), np.array(example.hidden)
    writable = np.asarray(example.writable)
    for _ in range(editing.turns - 1):
        segments = PACKED if rows_are == "packed" else None
        logits = llada_jax.denoise(params, config, noisy, example.clean, block_size=BLOCK, segment_ids=segments)
        p = np.array(jax.nn.softmax(logits))
        p[..., config.mask_token_id] = 0  # its mass is lost to the others
        token, confidence = p.argmax(-1), p.max(-1)
        for row in np.flatnonzero(coin < editing.draft_share):
            for edges in itertools.pairwise(EDGES[rows_are]):
                block = np.s_[row, slice(*edges)]
                masked = hidden[block] & writable[block]
                rows = [x[block][None] for x in (confidence, token, noisy)]
                gamma = masked & accept.sglang(rows[0], masked[None], np.float32([threshold[row]]))[0]
                editable = (writable[block] & ~hidden[block])[None]
                delta = accept.edits(*rows, editable, np.float32([editing_threshold[row]]))[0]
                noisy[block] = np.where(gamma | delta, token[block], noisy[block])
                hidden[block] = hidden[block] & ~gamma
    return noisy, hidden


@pytest.mark.parametrize("config", [TINY, SHIFTED, MOE])
@pytest.mark.parametrize(
    "rows_are,turns,share,edits",
    [("one document", 2, 1.0, False), ("one document", 3, 0.5, True), ("packed", 2, 1.0, True)],
)
def test_turns_write_what_the_decoder_would_have_written(config, rows_are, turns, share, edits):
    editing = Editing(
        weight=1.0, replace_high=0.3, turns=turns, draft_share=share, threshold_low=0.01, threshold_high=0.2,
        editing_low=0.0 if edits else 1.0, editing_high=0.2 if edits else 1.0,
    )  # fmt: skip
    objective = Objective(NoiseSpec(rate_low=0.3, rate_high=0.9), editing=editing)
    segments = PACKED if rows_are == "packed" else None
    example = prepared(random_ids(ROWS, LENGTH), BLOCK, config, objective, segments)
    params = params_of(config)
    found = drafted(params, config, example, objective, "both", Execution())
    noisy, hidden = by_hand(params, config, example, editing, rows_are)
    assert np.array_equal(found.noisy, noisy) and np.array_equal(found.hidden, hidden)
    assert (noisy != np.asarray(example.noisy)).any() and hidden.any()
    found = objectives.weighted(found, config, objective)
    assert np.array_equal(found.masked | found.unmasked, found.eligible)
    assert not np.asarray(found.masked & found.unmasked).any()


def test_oput_is_a_setting():
    """A rate of 0.75, all masked tokens become the argmax, and the loss is the mean over the answer (DMax)."""
    editing = Editing(
        weight=1.0, turns=2, threshold_low=0.0, threshold_high=0.0, editing_low=1.0, editing_high=1.0,
    )  # fmt: skip
    objective = Objective(NoiseSpec(rate_low=0.75, rate_high=0.75), time_weight="uniform", editing=editing)
    params, config = params_of(TINY), TINY
    example = prepared(random_ids(ROWS, LENGTH), BLOCK, config, objective)
    assert 0.6 < np.asarray(example.hidden).mean() < 0.9
    logits = llada_jax.denoise(params, config, example.noisy, example.clean, block_size=BLOCK)
    argmax = np.asarray(logits.at[..., config.mask_token_id].set(-jnp.inf).argmax(-1))
    drafts = np.where(np.asarray(example.hidden), argmax, np.asarray(example.clean))
    found = objectives.weighted(drafted(params, config, example, objective, "both", Execution()), config, objective)
    assert np.array_equal(found.noisy, drafts) and not np.asarray(found.hidden).any()
    sums, _ = objectives.score(params, config, found)
    logits = np.asarray(llada_jax.denoise(params, config, drafts, example.clean, block_size=BLOCK), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, np.asarray(example.clean)[..., None], -1).mean()
    value = objectives.loss(sums, objectives.normalizer(found, objective), objective)
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("needed_share", [0.0, 0.3, 1.0])
def test_best_tokens_are_those_of_the_logits(needed_share):
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(3, 500, 8)).astype(np.float32)  # more than one chunk
    matrix = rng.normal(size=(8, 40)).astype(np.float32)
    matrix[:, 7] = matrix[:, 5]  # a tie: the lower id
    needed = rng.random((3, 500)) < needed_share
    token, confidence = jax.jit(functools.partial(head.best_tokens, barred=(11, 13)))(hidden, needed, head=matrix)
    p = np.array(jax.nn.softmax(hidden @ matrix))
    p[..., [11, 13]] = 0
    assert np.array_equal(token, np.where(needed, p.argmax(-1), 0)) and not (np.asarray(token) == 7).any()
    np.testing.assert_allclose(confidence, np.where(needed, p.max(-1), 0), rtol=1e-5)


def test_the_loss_function_drafts_too_and_its_gradient_passes_by_the_drafts():
    editing = Editing(weight=1.0, turns=2, threshold_low=0.0, threshold_high=0.0)
    objective = Objective(editing=editing)
    batch = llada_jax.make_batch(random_ids(2, LENGTH))
    key = jax.random.key(0)
    params = params_of(TINY)
    value, slopes = jax.value_and_grad(llada_jax.loss)(params, TINY, batch, key, block_size=BLOCK, objective=objective)
    example = objectives.prepare_batch(batch, noise.keys_from(key, batch.row_ids, batch.epochs), BLOCK, TINY, objective,
                                       "both")  # fmt: skip
    example = objectives.weighted(drafted(params, TINY, example, objective, "both", Execution()), TINY, objective)

    @jax.value_and_grad
    def of_fixed_draft(params):
        sums, _ = objectives.score(params, TINY, example)
        return objectives.loss(sums, objectives.normalizer(example, objective), objective)

    expected, of_draft = jax.jit(of_fixed_draft)(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slopes, of_draft)


def test_keys_of_drafts_are_those_of_the_rows():
    assert np.array_equal(
        noise.uniform(keys_of(4), noise.DRAFTS, 3)[2:], noise.uniform(keys_of(4)[2:], noise.DRAFTS, 3)
    )


@pytest.mark.parametrize(
    "changes, block_size, message",
    [
        ({}, 2 * BLOCK, f"editing.block_size={BLOCK}, expected the block_size of the loss, {2 * BLOCK}"),
        ({}, None, f"editing.block_size={BLOCK}, expected the block_size of the loss, {LENGTH}"),
        ({"block_origin": "document"}, BLOCK, "block_origin='document'"),
        ({"editing": 5}, 5, f"rows of {LENGTH} tokens"),
        ({"model": TINY}, BLOCK, "no tokens that delete and insert"),
    ],
)
def test_edits_as_labels_of_other_blocks_are_refused(changes, block_size, message):
    model = changes.get("model", TINY.replace(delete_token_id=3, insert_token_id=4))
    editing = Editing(turns=2, labels="levenshtein", block_size=changes.get("editing", BLOCK))
    objective = Objective(editing=editing, block_origin=changes.get("block_origin", "global"))
    batch = llada_jax.make_batch(random_ids(1, LENGTH))
    with pytest.raises(InputError, match=message):
        llada_jax.loss(params_of(TINY), model, batch, jax.random.key(0), block_size=block_size, objective=objective)


def test_drafted_rows_may_have_edits_as_labels_and_write_none_of_them():
    config = TINY.replace(delete_token_id=3, insert_token_id=4)
    editing = Editing(
        weight=1.0, turns=2, draft_share=0.5, threshold_low=0.0, threshold_high=0.0, labels="levenshtein",
        block_size=BLOCK,
    )  # fmt: skip
    objective = Objective(editing=editing)
    ids = 10 + random_ids(6, LENGTH) % 3  # few tokens: drafts share some with their targets
    params = params_of(TINY)
    params |= {"head": params["head"] * jnp.isin(jnp.arange(TINY.vocab_size), jnp.array([3, 4, 10, 11, 12]))[None]}
    example = prepared(ids, BLOCK, config, objective)
    assert example.targets is None
    found = objectives.weighted(drafted(params, config, example, objective, "both", Execution()), config, objective)
    assert not np.isin(found.noisy, [3, 4]).any()
    rows = np.asarray(found.drafted)
    assert rows.any() and not rows.all()
    assert np.array_equal(found.targets[~rows], found.clean[~rows])
    blocks = [np.asarray(x)[rows].reshape(-1, BLOCK) for x in (found.noisy, found.clean, found.targets)]
    expected = labels(*map(jnp.asarray, blocks[:2]), config.mask_token_id, 3, 4)
    assert np.array_equal(blocks[2], expected) and np.isin(blocks[2], [3, 4]).any()
    _, scores = score(params, config, found)
    log_p = jax.nn.log_softmax(llada_jax.denoise(params, config, found.noisy, found.clean, block_size=BLOCK))
    nll = -np.take_along_axis(np.asarray(log_p), np.asarray(found.targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.nll, nll * np.asarray(found.eligible), rtol=1e-5)
