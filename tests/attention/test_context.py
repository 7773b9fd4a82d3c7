"""A row shared out over the context axis: where its tokens lie, what each rank computes, and what moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention import context
from llada_jax.attention.blockwise import blockwise_attention
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.kernel import kernel_attention, kernel_plan
from llada_jax.attention.visibility import block_causal, block_diffusion, make_layout
from llada_jax.chips import parse_topology
from llada_jax.data.order import Batch
from llada_jax.diffusion.groups import Groups, grouped
from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.model import forward, parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.pod import hlo, packings
from llada_jax.pod.collectives import Devices, collective_cost, kind_of
from llada_jax.training.config import check_rows, default_config
from llada_jax.training.step import denoising_loss

LENGTH = 64


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    return sharding.make_mesh(**{"data": 1} | sizes, devices=jax.devices()[:count])


def segments_of(length, *documents):
    """int32 [1, length]: documents of these lengths, then padding."""
    ids = np.repeat(np.arange(1, len(documents) + 1), documents)
    return jnp.asarray(np.pad(ids, (0, length - len(ids)))[None], jnp.int32)


def test_stripes_are_dealt_like_cards():
    np.testing.assert_array_equal(context.positions(8, 2), [[0, 1, 4, 5], [2, 3, 6, 7]])
    assert context.stripe_size(65536, 8) == context.STRIPE


@pytest.mark.parametrize("sizes", [dict(context=8), dict(data=2, context=4)])
def test_tokens_go_where_positions_says_and_come_back(sizes):
    x = jax.random.normal(jax.random.key(0), (2, 2, LENGTH, 3))
    ranks = sizes["context"]
    with jax.set_mesh(mesh_of(**sizes)):
        there = jax.jit(context.to_ranks)(x)
        back = jax.jit(lambda x: context.to_positions(x, 2))(there)
        some = jax.jit(lambda x: context.first(x, LENGTH))(there)
    own = context.positions(LENGTH, ranks)
    np.testing.assert_array_equal(there.reshape(2, ranks, 2, -1, 3), jnp.moveaxis(x[:, :, own], 1, 2))
    np.testing.assert_array_equal(some, x[:, 0, own].reshape(2, LENGTH, 3))
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("mean", packings.MEANS)
def test_ranks_need_equally_many_pairs_at_64k(mean):
    """Of the 16 rows of a step of a million tokens; of a single row of many documents less equally, but far more so
    than where each rank has two long chunks.
    """
    length, segments = 65536, packings.segment_ids(65536, mean)
    visibility = block_diffusion(make_layout(jnp.asarray(segments), 32))
    ends = ("clean_start", "clean_end"), ("noisy_start", "noisy_end")
    seen = sum(np.maximum(getattr(visibility, end) - getattr(visibility, start), 0) for start, end in ends)
    pairs = np.asarray(seen, np.int64).reshape(-1, 2, length).sum(axis=1)
    for ranks in (2, 4, 8):
        of_rank = pairs[:, context.positions(length, ranks)].sum(axis=2)
        assert imbalance(of_rank.sum(axis=0)) < 0.05
        assert np.mean([imbalance(row) for row in of_rank]) < 0.1
        chunks = pairs.reshape(len(pairs), 2 * ranks, -1).sum(axis=2)
        of_two = chunks[:, :ranks] + chunks[:, : ranks - 1 : -1]
        assert mean == 0 or np.mean([imbalance(row) for row in of_two]) > 0.1


def imbalance(work: np.ndarray) -> float:
    return work.max() / work.mean() - 1


PACKED = segments_of(LENGTH, 25, 2, 30)
MASKS = {
    "global": block_diffusion(make_layout(PACKED, 4)),
    "document": block_diffusion(make_layout(PACKED, 4, "document")),
    "groups": block_diffusion(grouped(make_layout(PACKED, 4), Groups(jnp.int32([4]), jnp.int32([1])), PACKED > 0)),
    "large blocks": block_diffusion(make_layout(PACKED, 32)),
    "one half": block_causal(make_layout(PACKED, LENGTH)),
}


@pytest.mark.parametrize(
    "kind,name,sizes",
    [("blockwise", name, dict(context=4, tensor=2)) for name in MASKS]
    + [("kernel", name, dict(context=2)) for name in ("global", "groups", "one half")],
)
def test_attention_of_the_ranks_is_that_of_the_row(kind, name, sizes):
    visibility = MASKS[name]
    halves = 2 if visibility.num_noisy else 1
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, halves, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    query, key, value, cotangent = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))

    def attend(query, key, value):
        seen = jax.tree.map(lambda bound: context.to_ranks(bound.reshape(1, halves, LENGTH)), visibility)
        operands = [context.to_ranks(x) for x in (query, key, value)]
        crosses = context.blocks_cross(seen)
        if kind == "kernel":
            plan = kernel_plan(seen, halves * LENGTH, 2, 8, interpret=True)
            out = kernel_attention(*operands, plan, interpret=True, crosses=crosses)
        else:
            out = blockwise_attention(*operands, seen, crosses)
        return context.to_positions(out, halves), crosses

    def of_row(query, key, value):
        operands = (x.reshape(1, -1, *x.shape[3:]) for x in (query, key, value))
        return dense_attention(*operands, visibility).reshape(query.shape)

    with jax.set_mesh(mesh_of(**sizes)):
        out, backward, crosses = jax.jit(lambda *x: jax.vjp(attend, *x, has_aux=True))(query, key, value)
        gradients = jax.jit(lambda f, x: f(x))(backward, cotangent)
    assert crosses == (name in ("document", "groups", "large blocks"))
    expected, of_dense = jax.jit(lambda *x: jax.vjp(of_row, *x))(query, key, value)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    expected = jax.jit(lambda f, x: f(x))(of_dense, cotangent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), gradients, expected)


SMALL = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=32)
MODELS = {
    "same": preset("tiny").replace(**SMALL | dict(rotary_dim=8)),
    "shifted": preset("tiny").replace(**SMALL | dict(rotary_dim=8, alignment="shifted")),
    "experts": preset("tiny_moe").replace(
        **SMALL | dict(num_layers=1, num_dense_layers=0, rotary_dim=4, moe_intermediate_size=16)
    ),
}


def loss_and_gradients(model, halves, origin, mesh=None):
    """((loss, load of the experts), gradients) of 2 packed rows, as host arrays."""
    loss = denoising_loss(
        model, Objective(block_origin=origin), Execution(attention="blockwise", remat="attention"), seed=0
    )

    def value(params, batch):
        example = loss.prepare(batch, jnp.int32(4 if halves == "both" else LENGTH), halves)
        value, sums = loss.value(params, None, example, loss.total(example), jnp.float32(0.1), halves)
        return value, sums.expert_load

    ids = np.random.default_rng(0).integers(0, model.mask_token_id, (2, LENGTH), dtype=np.int32)
    segments = np.array(jnp.repeat(segments_of(LENGTH, 25, 2, 30), 2, axis=0))
    segments[0] = 1
    index = np.arange(2, dtype=np.uint32)
    batch = Batch(ids, segments, np.ones(ids.shape, bool), index, np.zeros_like(index))
    params = parameters.initialize(model, jax.random.key(0))
    function = jax.value_and_grad(value, has_aux=True)
    if mesh is None:
        return jax.tree.map(np.asarray, jax.jit(function)(params, batch))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.shardings(params, parameters.logical_axes(model), mesh))
        own = jax.tree.map(lambda x: jax.NamedSharding(mesh, sharding.spec(("batch",), x.shape[:1], mesh)), batch)
        return jax.tree.map(np.asarray, jax.jit(function)(params, jax.device_put(batch, own)))


@pytest.mark.parametrize(
    "name,halves,origin,sizes",
    [
        ("same", "both", "global", dict(context=8)),
        ("shifted", "both", "document", dict(fsdp=2, context=4)),
        ("experts", "noisy", "global", dict(fsdp=2, expert=2, context=2)),
    ],
)
def test_a_mesh_with_a_context_axis_computes_what_one_device_does(name, halves, origin, sizes):
    model = MODELS[name]
    (loss, load), gradients = loss_and_gradients(model, halves, origin, mesh_of(**sizes))
    (expected_loss, expected_load), expected = loss_and_gradients(model, halves, origin)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, load, expected_load)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), gradients, expected)


def moved(module: hlo.Module, computation: str, devices: Devices):
    """(kind, mesh axes, bytes that a device sends) of the collectives of a loop's body; not of its conditionals."""
    costs = [
        collective_cost(module, computation, op, devices) for op in module.computations[computation] if kind_of(op)
    ]
    return sorted((cost.kind, cost.axes, cost.bytes) for cost in costs if cost.bytes)


def test_a_layer_moves_clean_keys_and_values_alone():
    """All loops that move anything: the layers' forward pass, and their backward pass, which gathers again."""
    ranks, model = 4, MODELS["shifted"].replace(num_layers=3)
    layout = make_layout(segments_of(LENGTH, 25, 30), 4)
    tokens, execution = jnp.zeros((1, LENGTH), jnp.int32), Execution(attention="blockwise", remat="attention")

    def run(noise, params):
        return forward.denoising_pass(params, model, tokens, tokens, layout, tokens, execution, noise)[0].sum()

    mesh = mesh_of(context=ranks)
    with jax.set_mesh(mesh):
        noise = jax.ShapeDtypeStruct((1, LENGTH, model.hidden_size), jnp.float32)
        compiled = jax.jit(jax.grad(run)).lower(noise, parameters.abstract(model)).compile()
    module = hlo.parse(compiled.as_text())
    line = Devices(dict(mesh.shape), parse_topology("v5e:2x2"), np.arange(ranks)[:, None], np.zeros(ranks, int))
    loops = [op.called_as("body") for op in module.computations[module.entry] if op.kind == "while"]
    size = LENGTH * model.num_kv_heads * model.head_dim * 4 * (ranks - 1) / ranks
    gathers, sums = [("all-gather", "context", size)] * 2, [("reduce-scatter", "context", size)] * 2
    assert [found for body in loops if (found := moved(module, body, line))] == [gathers, gathers + sums]


def test_bad_sizes_are_named():
    with pytest.raises(InputError, match="mesh.context=4: rows of 40 tokens, expected a multiple of 16"):
        context.stripe_size(40, 4)
    config = default_config("tiny")
    config.data.length = 200
    with pytest.raises(InputError, match="mesh.context=8: rows of 200 tokens"):
        check_rows(config, mesh_of(context=8))
    config.data.length, config.batch.rows = 256, 3
    with pytest.raises(InputError, match="config.batch.rows=3 cannot be shared by 8 devices"):
        check_rows(config, mesh_of(fsdp=2, context=4))
    model, tokens = MODELS["same"], jnp.zeros((1, LENGTH), jnp.int32)
    params = parameters.initialize(model, jax.random.key(0))
    with jax.set_mesh(mesh_of(context=2)):
        with pytest.raises(InputError, match="mesh.context=2: expected 1"):
            forward.forward(params, model, tokens)
        with pytest.raises(InputError, match="'dense' with mesh.context=2, expected 'blockwise' or 'kernel'"):
            forward.denoise(params, model, tokens, tokens, block_size=4)
        with pytest.raises(InputError, match="routing_block=3 must divide them"):
            forward.denoise(params, model.replace(routing_block=3), tokens, tokens, block_size=4)
