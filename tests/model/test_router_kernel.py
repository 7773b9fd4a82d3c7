"""The router's Pallas kernels, interpreted, against the plain router; and compiled for a TPU that is not there."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.chips import parse_topology
from llada_jax.model import experts, parameters, router_kernel, rows_kernel
from llada_jax.model.config import preset
from llada_jax.model.forward import REMAT_POLICIES, Execution
from llada_jax.model.grouped_matmul import KERNELS
from llada_jax.model.router import _logits, _select, route
from llada_jax.pod import routing_cost
from llada_jax.pod.hlo import Array
from llada_jax.pod.topology import one_device
from llada_jax.sharding import WeightShards

MINI = preset("llada2_mini")
QWEN = preset("qwen3_30b_a3b")
SMALL = MINI.replace(num_experts=64, num_groups=4, num_selected_groups=2, num_experts_per_token=3)
SMALL_SOFTMAX = SMALL.replace(router="softmax", num_groups=1, num_selected_groups=1)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(router_kernel, "TILE", 128)
    monkeypatch.setattr(rows_kernel, "TILE", 128)


@pytest.mark.parametrize(
    "config,tokens",
    [(MINI, 40), (QWEN, 130), (SMALL, 300), (SMALL.replace(num_groups=1, num_selected_groups=1, num_experts=40), 1)],
    ids=["groups", "softmax", "several tiles", "a token"],
)
def test_equals_the_plain_router(config, tokens, small_tiles):
    rng = np.random.default_rng(0)
    x, router, bias, cotangent = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((tokens, 16), (16, config.num_experts), config.num_experts, (config.num_experts_per_token, tokens))
    )
    bias = bias if config.expert_bias else None

    def run(kernel):
        def weights(x, router):
            experts, weights = route(x, router, bias, config, kernel, interpret=True)
            return weights, experts

        found, vjp, experts = jax.vjp(weights, x, router, has_aux=True)
        return experts, found, vjp(cotangent)

    (experts, *ours), (expected, *plain) = jax.jit(lambda: (run("megablox"), run("xla")))()
    np.testing.assert_array_equal(experts, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, plain)


@pytest.mark.parametrize("config", [SMALL, SMALL_SOFTMAX])
def test_ties_and_extremes_go_as_in_the_plain_router(config):
    """Few different logits, so that experts and groups tie; one token of equals, and some scores of exactly 0 and 1."""
    logits = np.random.default_rng(0).integers(-1, 2, (50, 64)).astype(np.float32)
    logits[0] = 0
    logits[1, ::3], logits[2, 5:9] = -np.inf, 200
    logits[3, 1:] = -200
    logits = jnp.asarray(logits)
    ours = router_kernel.select(logits.T, None, config, True)
    expected = _select(logits, None, config)
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-6)


def test_logits_of_bfloat16_are_float32():
    rng = np.random.default_rng(0)
    x, router, cotangent = (rng.normal(size=size).astype(np.float32) for size in ((30, 256), (256, 16), (30, 16)))
    x = jnp.asarray(x, jnp.bfloat16)
    logits, vjp = jax.vjp(jax.jit(_logits), x, router)
    exact = np.asarray(x, np.float64)
    scale = np.abs(exact) @ np.abs(router)
    assert np.abs((logits - exact @ router) / scale).max() < 2e-7
    assert np.abs(x.astype(jnp.float32) @ router.astype(jnp.bfloat16) - exact @ router).max() > 1e-3
    d_x, d_router = vjp(cotangent)
    assert d_x.dtype == jnp.bfloat16 and d_router.dtype == jnp.float32
    np.testing.assert_allclose(d_router, exact.T @ cotangent, rtol=1e-5, atol=1e-5)


def test_experts_of_nan_exist():
    """Rows are taken at the experts without a check of bounds."""
    experts, _ = router_kernel.select(jnp.full((64, 4), jnp.nan), None, SMALL, True)
    assert ((0 <= experts) & (experts < 64)).all()


def test_other_routers_take_the_plain_path():
    for config in (preset("tiny_moe"), MINI.replace(routing_block=8, routing_block_experts=16)):
        assert not router_kernel.fits(config)
    assert router_kernel.fits(MINI) and router_kernel.fits(QWEN)


def test_costs_of_the_kernels():
    """Compiler-estimated; a vector unit compares 1024 numbers a cycle and slot, of which there are four."""
    costs = routing_cost.kernel_costs(MINI, 32768, 1, parse_topology("v5p:2x2x1"))
    logits, chosen = Array("f32", (256, 32768), True), Array("f32", (8, 32768), True)
    counts, first = Array("f32", (2, 8, 256), True), Array("f32", (2, 256, 128), True)

    def microseconds(name, result, *operands):
        part, cost = costs[name](result, operands)
        assert part == "glue"
        return cost.seconds * 1e6

    # XLA's own operations take 140 for the groups, 340 for the sort, 530 for the scores, 550 for the gradient.
    assert 20 < microseconds("router_selection_forward", (chosen, chosen), logits) < 80
    assert 10 < microseconds("router_selection_backward", (logits,), chosen, chosen, chosen) < 16
    assert 5 < microseconds("router_rows_count", (counts,), chosen) < 15
    assert 10 < microseconds("router_rows_place", (chosen,), chosen, first) < 40


@pytest.mark.parametrize("num_experts,tokens,somewhere", [(16, 40, 0), (64, 600, 5), (12, 300, 3)])
def test_sorting_by_counting_equals_sorting(num_experts, tokens, somewhere, small_tiles):
    """somewhere: so many experts below and above those that are here."""
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(num_experts + 2 * somewhere)[:4] - somewhere for _ in range(tokens)]
    chosen = jnp.asarray(np.stack(chosen, axis=1), jnp.int32)
    ours, plain = (
        experts.sort_by_expert(chosen, num_experts, somewhere > 0, kernel, interpret=True) for kernel in KERNELS
    )
    rows = int(ours.group_sizes.sum())
    np.testing.assert_array_equal(ours.pair[:rows], plain.pair[:rows])
    np.testing.assert_array_equal(ours.where_here(ours.row), plain.where_here(plain.row))
    np.testing.assert_array_equal(ours.group_sizes, plain.group_sizes)
    j, token = np.divmod(np.asarray(ours.pair[:rows]), tokens)
    np.testing.assert_array_equal(np.asarray(ours.row)[j, token], np.arange(rows))
    sorted_experts = np.asarray(chosen)[j, token]
    order = np.stack([sorted_experts, token])
    np.testing.assert_array_equal(np.lexsort(order[::-1]), np.arange(rows))
    assert ours.row.max() < len(ours.pair)


def test_more_pairs_than_32_bits_tell_apart_are_sorted_too():
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 50)), jnp.int32)
    np.testing.assert_array_equal(experts._sorted_pairs(chosen, 6), experts._sorted_pairs(chosen, 2**28))


def test_a_layer_of_experts_by_kernels_equals_the_plain_one(small_tiles):
    changes = dict(num_layers=2, hidden_size=32, moe_intermediate_size=16)
    config = SMALL.replace(num_experts=16, num_groups=2, num_selected_groups=1, **changes)
    weights = jax.tree.map(lambda w: w[0], parameters.initialize(config, jax.random.key(0))["sparse"])
    x = jax.random.normal(jax.random.key(1), (2, 5, 32))

    @functools.partial(jax.jit, static_argnums=0)
    def layer(kernel, x, weights):
        return experts.moe((x, x), weights, WeightShards(), config, Execution(experts=kernel, interpret=True))

    (ours, load), (plain, expected) = (layer(kernel, x, weights) for kernel in KERNELS)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(load, expected)
    assert load.shape == (1, 16) and load.sum() == 2 * 5 * 3


@pytest.mark.parametrize("config", [SMALL, SMALL_SOFTMAX], ids=["sigmoid", "softmax"])
def test_the_backward_pass_selects_and_sorts_nothing(config, capsys):
    """With a remat policy that keeps "routing"; of all scores, only a softmax keeps something."""

    def weights(x, router):
        chosen, weights = route(x, router, None, config, "megablox")
        return experts.rows_of_pairs(weights, experts.sort_by_expert(chosen, 64, kernel="megablox")).sum()

    layer = jax.checkpoint(weights, policy=REMAT_POLICIES["attention"])
    mesh = one_device(parse_topology("v5p:2x2x1"))
    replicated = NamedSharding(mesh, PartitionSpec())
    x, router = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated) for shape in ((700, 16), (16, 64)))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(layer, (0, 1))).lower(x, router).compile().as_text()
        print_saved_residuals(layer, x, router)
    for kernel in ("selection_forward", "rows_count", "rows_place", "selection_backward"):
        assert len(re.findall(rf"%\w*router_{kernel}[\w.]* = ", program)) == 1
    assert len(re.findall(r" sort\(", program)) == 1
    assert ("f32[64,700]" in capsys.readouterr().out) == (config.router == "softmax")
