"""Experts, router, head and rotary embedding against plain formulas; presets against published sizes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llada_jax
from llada_jax.attention.visibility import make_layout
from llada_jax.errors import InputError
from llada_jax.model import experts, head, parameters
from llada_jax.model.alignment import predictable
from llada_jax.model.config import PRESETS, ModelConfig, RopeScaling, preset
from llada_jax.model.forward import EXPERT_WEIGHTS, Execution
from llada_jax.model.grouped_matmul import _tiles, grouped_matmul, stack_matmul
from llada_jax.model.layers import rope_angles, rope_frequencies
from llada_jax.model.router import balanced_bias, route
from llada_jax.sharding import WeightShards, make_mesh, over_batch


def test_presets_have_the_published_number_of_parameters():
    assert parameters.count(preset("llada2_mini")) == 16_255_643_392
    assert parameters.count(preset("llada2_flash")) == 102_889_705_216
    assert parameters.count(preset("smollm2_135m")) == 134_515_008
    assert parameters.count(preset("qwen3_30b_a3b")) == 30_532_122_624
    names = sum(p.shape[0] if p.per_expert else 1 for p, _ in parameters.leaves(preset("llada2_mini")).values())
    assert names - 2 * 20 == 14_813  # query, key and value are one tensor there


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_its_dict(name):
    assert ModelConfig.from_dict(preset(name).to_dict()) == preset(name)


def test_stack_is_the_inverse_of_unstack():
    config = preset("tiny_moe")
    params = jax.device_get(parameters.initialize(config, jax.random.key(0)))
    flat = parameters.unstack(params, config)
    assert set(flat) == set(parameters.leaves(config))
    jax.tree.map(np.testing.assert_array_equal, parameters.stack(flat, config), params)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(1, 4), (37, 5), (64, 40), (300, 3)]), st.integers(0, 50))
def test_grouped_matmul_is_a_matmul_by_group(size, seed):
    check_grouped_matmul(*size, seed, kernel="xla")


@pytest.mark.parametrize("rows,groups,missing", [(37, 5, 0), (64, 40, 0), (48, 3, 11)])
def test_megablox_is_a_matmul_by_group(rows, groups, missing):
    check_grouped_matmul(rows, groups, 0, missing, kernel="megablox", interpret=True)


def check_grouped_matmul(rows, groups, seed, missing=0, **execution):
    """`missing` rows at the end are of no group: they hold anything, also in dx, and change nothing else."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, groups, rows - missing))
    x, w, cotangent = (rng.normal(size=s).astype(np.float32) for s in ((rows, 8), (groups, 8, 12), (rows, 12)))
    used = slice(rows - missing)
    sizes = np.bincount(ids, minlength=groups).astype(np.int32)

    @jax.jit
    def both(sizes, ids, x, w, cotangent):
        functions = (
            lambda x, w: grouped_matmul(x, w, sizes, **execution)[used],
            lambda x, w: jnp.einsum("mk,mkn->mn", x[used], w[ids]),
        )
        return [(y, vjp(cotangent[used])) for y, vjp in (jax.vjp(f, x, w) for f in functions)]

    (y, (dx, dw)), (plain_y, (plain_dx, plain_dw)) = both(sizes, ids, x, w, cotangent)
    np.testing.assert_allclose(y, plain_y, atol=1e-5)
    np.testing.assert_allclose(dx[used], plain_dx[used], atol=2e-5)
    np.testing.assert_allclose(dw, plain_dw, atol=2e-5)


@pytest.mark.parametrize("execution", [dict(kernel="xla"), dict(kernel="megablox", interpret=True)])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_of_a_stack_is_multiplied_where_it_lies(layer, execution):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 5, 32))
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 8), (5, 8, 12)))
    stack = jnp.full((3, *w.shape), jnp.nan).at[layer].set(w)  # what is read of another layer shows
    found = stack_matmul(x, stack, jnp.int32(layer), jnp.bincount(ids, length=5), **execution)
    np.testing.assert_allclose(found, jnp.einsum("mk,mkn->mn", x, w[ids]), atol=1e-5)


def test_experts_are_read_in_place_where_nothing_is_cast_or_gathered():
    config = preset("tiny_moe")
    stacks = {name: parameters.abstract(config)["sparse"][name] for name in experts.EXPERTS}
    axes = parameters.logical_axes(config)["sparse"]

    def in_place(expert_parallel="gather_weights", dtype="float32", **sizes):
        with jax.set_mesh(make_mesh(**{"data": 1} | sizes, devices=jax.devices()[: math.prod(sizes.values())])):
            how = Execution(expert_parallel=expert_parallel)
            return experts.stacks_in_place(stacks, axes, how, dtype) == stacks

    assert (
        in_place()
        and in_place(tensor=2)
        and in_place(data=4)
        and in_place(expert_parallel="gather_tokens", expert=2, tensor=2)
    )
    assert not in_place(dtype="bfloat16") and not in_place(fsdp=2) and not in_place(expert=2)


def test_experts_equal_the_dense_sum_over_all_experts():
    rng = np.random.default_rng(0)
    tokens, count, k = 50, 6, 2
    x, gate, up, down = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((tokens, 8), (count, 8, 5), (count, 8, 5), (count, 5, 8))
    )
    chosen = jnp.asarray(np.stack([rng.permutation(count)[:k] for _ in range(tokens)], axis=1))
    weights = jnp.asarray(rng.random((k, tokens)), jnp.float32)

    def dense(x, gate, up, down, weights):
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
        y = jnp.einsum("tef,efd->ted", hidden, down)
        return jnp.einsum("ted,kte,kt->td", y, jax.nn.one_hot(chosen, count), weights)

    def ours(x, gate, up, down, weights):
        move = experts.sort_by_expert(chosen, count)
        return experts.combine_experts(x, move, weights, jnp.concatenate([gate, up], 2), down)

    arguments = x, gate, up, down, weights

    def output_and_gradients(f):
        value = jax.value_and_grad(lambda *a: (jnp.sin(y := f(*a)).sum(), y), range(5), has_aux=True)
        (_, y), gradients = jax.jit(value)(*arguments)
        return y, gradients

    (y, gradients), (plain_y, plain_gradients) = output_and_gradients(ours), output_and_gradients(dense)
    np.testing.assert_allclose(y, plain_y, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradients, plain_gradients)


def test_a_batch_that_is_whole_on_all_ranks_of_the_experts():
    """One row, two ranks with tokens gathered: sums, load and gradients of one device."""
    config = preset("tiny_moe").replace(hidden_size=32, moe_intermediate_size=16)
    weights = jax.tree.map(lambda w: w[0], parameters.initialize(config, jax.random.key(0))["sparse"])
    weights = {name: w for name, w in weights.items() if name in EXPERT_WEIGHTS}
    axes, x = parameters.layer_axes(config, "sparse", weights), jax.random.normal(jax.random.key(1), (1, 24, 32))

    def run(execution):
        def moe(inputs, weights, shards):
            y, load = experts.moe(inputs, weights, shards, config, execution)
            return y, load[None]

        def loss(x, weights):
            y, load = over_batch(moe, axes)((x, x), weights)
            return jnp.sin(y).sum(), (y, load.sum((0, 1)))

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, weights)
        return outputs, gradients

    expected = run(Execution())
    with jax.set_mesh(make_mesh(data=1, expert=2, devices=jax.devices()[:2])):
        found = run(Execution(expert_parallel="gather_tokens"))
    assert expected[0][1].sum() == 24 * config.num_experts_per_token
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def float_scatters(function, *arguments) -> list[str]:
    """Types of what a traced program scatters; a scatter of rows is serial on a TPU."""
    return re.findall(r":(f\d+)\[[\d,]*\] = scatter", str(jax.make_jaxpr(function)(*arguments)))


def test_experts_move_tokens_without_scatter():
    config = preset("tiny_moe").replace(hidden_size=32, moe_intermediate_size=16)
    weights = jax.tree.map(lambda w: w[0], parameters.initialize(config, jax.random.key(0))["sparse"])

    def loss(x, weights):
        y, _ = experts.moe((x, x), weights, WeightShards(), config, Execution())
        return jnp.sin(y).sum()

    assert float_scatters(jax.grad(lambda x: jnp.sin(x[jnp.array([1, 0])]).sum()), jnp.ones((2, 3))) == ["f32"]
    x = jnp.ones((2, 16, 32))
    # The one that is left adds up the tiles of a group in the weight gradient of the kernel "xla".
    assert len(float_scatters(jax.grad(loss, (0, 1)), x, weights)) == 2


def test_cost_of_the_experts_does_not_grow_with_their_number():
    def flops(count):
        x, w = jnp.ones((256, 16)), jnp.ones((count, 16, 16))
        sizes = jnp.asarray(np.where(np.arange(count) < 4, 64, 0), jnp.int32)
        tile, used, *_ = _tiles(256, sizes)
        assert jax.eval_shape(grouped_matmul, x, w, sizes).shape == (256, 16)
        return tile * int(used)

    assert flops(256) <= 2 * flops(8)


def route_by_loops(x, router, bias, c):
    scores = 1 / (1 + np.exp(-(np.asarray(x, np.float64) @ np.asarray(router, np.float64))))
    chosen, weights = [], []
    for s in scores:
        r = s + bias
        groups = np.split(np.arange(c.num_experts), c.num_groups)
        best = sorted(groups, key=lambda g: -np.sort(r[g])[-2:].sum())[: c.num_selected_groups]
        eligible = sorted(np.concatenate(best), key=lambda e: -r[e])[: c.num_experts_per_token]
        chosen.append(eligible)
        weights.append(s[eligible] / s[eligible].sum() * c.routed_scaling_factor)
    return np.array(chosen), np.array(weights)


def jitted_route(x, router, bias, c):
    found, weights = jax.jit(functools.partial(route, config=c))(*map(np.float32, (x, router, bias)))
    return np.asarray(found), np.asarray(weights)


def test_sigmoid_router_selects_with_bias_and_weighs_without():
    c, rng = preset("tiny_moe"), np.random.default_rng(0)
    x, router = rng.normal(size=(40, 128)), rng.normal(size=(128, 16)) * 0.1
    bias = rng.normal(size=16) * 0.3
    found, weights = jitted_route(x, router, bias, c)
    expected, expected_weights = route_by_loops(x, router, bias, c)
    assert np.array_equal(found.T, expected)
    np.testing.assert_allclose(weights.T, expected_weights, rtol=1e-4)


def test_block_router_limits_the_experts_of_a_block():
    """LLaDA2.2: by loops, 3 blocks of 8 tokens with 6 of 16 experts each; groups take no part."""
    c, rng = preset("tiny_moe").replace(routing_block=8, routing_block_experts=6), np.random.default_rng(0)
    x, router = rng.normal(size=(24, 128)), rng.normal(size=(128, 16)) * 0.1
    bias = rng.normal(size=16) * 0.3
    found, weights = jitted_route(x, router, bias, c)
    scores = 1 / (1 + np.exp(-(x @ router)))
    for block in range(3):
        rows = slice(8 * block, 8 * block + 8)
        allowed = np.argsort(-(scores[rows] + bias).max(axis=0))[:6]
        for s, chosen, weight in zip(scores[rows], found.T[rows], weights.T[rows], strict=True):
            expected = sorted(allowed, key=lambda e: -(s + bias)[e])[:4]
            assert list(chosen) == expected
            np.testing.assert_allclose(weight, s[expected] / s[expected].sum() * 2.5, rtol=1e-4)
    with pytest.raises(InputError, match="routing_block=8 must divide"):
        experts.moe((jnp.ones((2, 12, 128)),) * 2, {}, WeightShards(), c, Execution())


def test_bias_moves_towards_the_experts_with_little_load():
    moved = balanced_bias(jnp.zeros((2, 4)), jnp.array([[9, 1, 1, 1], [3, 3, 3, 3]]), 1e-3)
    np.testing.assert_allclose(moved, [[-1.5e-3, 5e-4, 5e-4, 5e-4], [0, 0, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("length", [10, 128, 200])
def test_token_scores_equal_the_full_softmax(length, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 64)
    rng = np.random.default_rng(0)
    hidden, matrix = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, length, 8), (8, 33)))
    targets = jnp.asarray(rng.integers(0, 33, (2, length)))
    supervised = jnp.asarray(rng.random((2, length)) < 0.4)
    ramp = jnp.arange(length, dtype=jnp.float32)[None]

    def ours(hidden, matrix):
        s = head.token_scores(hidden, targets, supervised, matrix, entropy_temperature=0.7)
        return (s.nll * ramp).sum() + s.entropy.sum(), s

    def plain(hidden, matrix):
        log_p = jax.nn.log_softmax(hidden @ matrix)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * supervised
        tempered = jax.nn.log_softmax(hidden @ matrix / 0.7)
        entropy = -(jnp.exp(tempered) * tempered).sum(-1) * supervised
        correct = (log_p.argmax(-1) == targets) * supervised
        return (nll * ramp).sum() + entropy.sum(), head.TokenScores(nll, correct, entropy)

    (_, a), ga = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, matrix)
    (_, b), gb = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(hidden, matrix)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-3), (a, ga), (b, gb))


def test_llama3_scaling_keeps_fast_and_slows_slow_channels():
    c = preset("tiny").replace(head_dim=128, rotary_dim=128, rope_theta=500_000.0)
    scaled = c.replace(rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
    plain, slowed = rope_frequencies(c)[0], rope_frequencies(scaled)[0]
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(slowed[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(slowed[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert ((slowed < plain) & (slowed > plain / 8))[between].all() and between.any()


def test_linear_scaling_divides_the_positions():
    c = preset("tiny")
    positions = jnp.asarray([[0, 1, 7, 400]])
    scaled = rope_angles(c.replace(rope_scaling=RopeScaling("linear", 4.0)), positions)
    np.testing.assert_allclose(scaled, rope_angles(c, positions / 4), atol=1e-6)


def test_what_a_model_can_be_asked_for():
    """No padding and, where a token is predicted by its predecessor, no first token of a document."""
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0]])
    expected = {"same": [1, 1, 1, 1, 1, 1, 0], "shifted": [0, 1, 1, 0, 1, 0, 0]}
    for alignment, tokens in expected.items():
        found = predictable(make_layout(segments, 2), segments, alignment)
        assert np.asarray(found).astype(int).tolist() == [tokens]


def test_packed_rows_and_positions():
    config = preset("tiny").replace(num_layers=1)
    params = parameters.initialize(config, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 500, (1, 12))
    packed = llada_jax.forward(params, config, ids, segment_ids=np.repeat([[1, 2, 0]], [5, 6, 1], axis=1))
    alone = llada_jax.forward(params, config, ids[:, 5:11])
    np.testing.assert_allclose(packed[:, 5:11], alone, atol=1e-5)
    moved = llada_jax.forward(params, config, ids[:, 5:11], positions=np.arange(7, 13)[None])
    np.testing.assert_allclose(moved, alone, atol=1e-4)  # rotary positions are relative


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(tokens=np.zeros((1, 0), int)), "tokens has shape"),
        (dict(tokens=np.zeros(4, int)), "tokens has shape"),
        (dict(tokens=np.full((1, 4), 600)), "vocabulary is 512"),
        (dict(tokens=np.zeros((1, 4))), "expected an integer"),
        (dict(mask="diagonal"), "mask='diagonal'"),
        (dict(mask=("block_causal", 0)), "mask="),
        (dict(segment_ids=np.ones((1, 3), int)), "segment_ids has shape"),
        (dict(segment_ids=np.array([[1, 2, 1, 1]])), "several pieces"),
        (dict(positions=np.ones((2, 4), int)), "positions has shape"),
        (dict(block_origin="row"), "block_origin"),
    ],
)
def test_forward_names_what_is_wrong(changes, message):
    config = preset("tiny").replace(num_layers=1)
    params = parameters.abstract(config)
    with pytest.raises(ValueError, match=message):
        llada_jax.forward(params, config, **dict(tokens=np.zeros((1, 4), int)) | changes)


@pytest.mark.parametrize(
    "changes,field",
    [(dict(num_kv_heads=3), "num_heads"), (dict(vocab_size=0), "vocab_size"), (dict(alignment="left"), "alignment"),
     (dict(rotary_dim=33), "rotary"), (dict(mask_token_id=512), "mask_token_id"), (dict(architecture="x"), "archi")],
)  # fmt: skip
def test_config_names_the_field(changes, field):
    with pytest.raises(InputError, match=field):
        preset("tiny").replace(**changes)
