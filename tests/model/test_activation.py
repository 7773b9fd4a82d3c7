"""The experts' activation: its kernels, interpreted, against the formula; what a layer computes again; their cost."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.chips import CHIPS
from llada_jax.model import activation, experts, grouped_matmul
from llada_jax.model.activation import tile, weighted_swiglu, weighted_swiglu_gradients
from llada_jax.model.forward import REMAT_POLICIES
from llada_jax.pod.aot import compile_program
from llada_jax.pod.schedule_reader import main_loop
from tests.pod.test_schedule_reader import SLICES

KERNELS = {"xla": {}, "megablox": {"kernel": "megablox", "interpret": True}}


def arrays(rows, mlp, dtype=jnp.float32):
    """gate_up, weights and the gradient of hidden."""
    rng = np.random.default_rng(rows)
    gate_up, d_hidden = (jnp.asarray(rng.normal(size=(rows, width)) * 3, dtype) for width in (2 * mlp, mlp))
    return gate_up, jnp.asarray(rng.random(rows), jnp.float32), d_hidden


def plain(gate_up, weights, d_hidden):
    """hidden and the gradients by hand, in float64."""
    gate_up, weights, d_hidden = (np.asarray(x, np.float64) for x in (gate_up, weights, d_hidden))
    gate, up = np.split(gate_up, 2, axis=1)
    sigmoid, w = 1 / (1 + np.exp(-gate)), weights[:, None]
    d_gate = d_hidden * w * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_hidden * w * gate * sigmoid
    hidden = gate * sigmoid * up
    return hidden * w, np.concatenate([d_gate, d_up], 1), (d_hidden * hidden).sum(1)


@pytest.fixture
def blocks(monkeypatch):
    """Of few rows, to have several."""
    monkeypatch.setattr(activation, "_ROWS", activation.LANES)


@pytest.mark.parametrize("how", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype,error", [("float32", 2e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("rows,mlp", [(5, 24), (300, 128)])
def test_activation_is_its_formula(rows, mlp, dtype, error, how, blocks):
    gate_up, weights, d_hidden = arrays(rows, mlp, dtype)
    hidden, d_gate_up, d_weights = plain(gate_up, weights, d_hidden)
    ours = weighted_swiglu_gradients(gate_up, weights, d_hidden, **how)
    assert [x.dtype for x in ours] == [dtype, dtype, jnp.float32]
    np.testing.assert_array_equal(ours[0], weighted_swiglu(gate_up, weights, **how))
    for x, expected in zip(ours[:2], (hidden, d_gate_up), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), expected, rtol=error, atol=1e-6)
    np.testing.assert_allclose(ours[2], d_weights, rtol=2e-6, atol=1e-4)  # float32 sums


def test_a_row_keeps_its_nan_to_itself(blocks):
    gate_up, weights, d_hidden = arrays(140, 16)
    bad = jnp.asarray([7, 130, 139])
    spoiled = gate_up.at[bad].set(jnp.nan), weights, d_hidden.at[bad].set(jnp.inf)
    clean = np.setdiff1d(np.arange(140), bad)
    for x, y in zip(
        weighted_swiglu_gradients(*spoiled, **KERNELS["megablox"]),
        weighted_swiglu_gradients(gate_up, weights, d_hidden, **KERNELS["megablox"]),
        strict=True,
    ):
        np.testing.assert_array_equal(x[clean], y[clean])
        assert not np.isfinite(x[bad]).any()


@pytest.mark.parametrize("some_elsewhere", [False, True])
def test_experts_are_the_same_with_both_kernels(some_elsewhere):
    rng = np.random.default_rng(0)
    tokens, count, k, here = 12, 4, 2, 3 if some_elsewhere else 4
    shapes = (tokens, 8), (k, tokens), (here, 8, 2 * 24), (here, 24, 8)
    x, weights, gate_up, down = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    chosen = jnp.asarray(np.stack([rng.permutation(count)[:k] for _ in range(tokens)], axis=1))

    def output_and_gradients(how):
        def output(x, weights, gate_up, down):
            move = experts.sort_by_expert(chosen, here, some_elsewhere, **how)
            return experts.combine_experts(x, move, weights, gate_up, down, **how)

        y, gradients = jax.vjp(output, x, weights, gate_up, down)
        return y, gradients(jnp.cos(y))

    results = [jax.jit(functools.partial(output_and_gradients, how))() for how in KERNELS.values()]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def operations(jaxpr) -> list[str]:
    """Names of the kernels that a traced program runs, and of its other operations."""
    names = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            names.append(eqn.params["name"] or "matmul")  # megablox gives none
        else:
            names.append(eqn.primitive.name)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    names += operations(getattr(inner, "jaxpr", inner))
    return names


@pytest.mark.parametrize("remat,again", [("rows", 0), ("hidden", 0), ("projections", 1)])
def test_what_is_kept_is_not_computed_again(monkeypatch, remat, again):
    monkeypatch.setattr(grouped_matmul, "device_kind", lambda: "TPU v5")
    shapes = (16, 8), (2, 16), (3, 8, 32), (3, 16, 8)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    chosen = jnp.zeros((2, 16), jnp.int32).at[1].set(1)

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[remat])
    def layer(x, weights, gate_up, down):
        move = experts.sort_by_expert(chosen, 3, kernel="megablox")
        return experts.combine_experts(x, move, weights, gate_up, down, "megablox")

    gradient = jax.jit(jax.grad(lambda *operands: jnp.sin(layer(*operands)).sum(), range(4)))
    counts = Counter(operations(gradient.trace(*operands).jaxpr.jaxpr))
    assert counts["expert_activation_forward"] == counts["expert_activation_backward"] == 1
    assert counts["matmul"] == 6 + again
    # JAX rounds what is kept and is read by the forward pass too: here in copies between the kernels.
    assert not counts["reduce_precision"]


@pytest.mark.parametrize("name", ["v5p", "v6e"])
def test_kernels_take_no_longer_than_their_copies(name):
    """At the width of llada2_mini's experts."""
    chip, rows, mlp = CHIPS[name], 2**16, 512
    program = compile_program("llada_jax.pod.experts_cost:activation_program", {"rows": rows, "mlp": mlp}, SLICES[name])
    rows_of_step = tile(rows, 2 * mlp, jnp.dtype("bfloat16"))
    values = {"expert_activation_forward": 3 * mlp, "expert_activation_backward": 6 * mlp}
    assert {kernel.split(".")[0] for kernel in program.kernels} == set(values)
    for kernel, schedule in program.kernels.items():
        assert schedule.split == (chip.cores_per_device == 2)
        bandwidth = chip.hbm_bandwidth / chip.cores / chip.clock  # bytes a cycle
        copies = 2 * values[kernel.split(".")[0]] * rows_of_step / bandwidth
        bundles = main_loop(schedule).total.bundles
        print(f"{name} {kernel}: {bundles} bundles and {copies:.0f} cycles of copies a step of {rows_of_step} rows")
        assert bundles < copies
