"""The experts' kernel of decoding against the sorted matmuls, and against what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.visibility import block_window
from llada_jax.chips import parse_topology
from llada_jax.model import experts as experts_module
from llada_jax.model import fused_experts, parameters
from llada_jax.model.config import preset
from llada_jax.model.experts import combine_in_stacks, sort_by_expert
from llada_jax.model.forward import Execution, hidden_states
from llada_jax.pod.topology import one_device
from llada_jax.sampling.quantize import quantize_experts


def layer(rng, experts, embed, width=128, dtype=jnp.float32):
    """Weights of two layers, of which the second is used."""
    shapes = {"gate": (embed, width), "up": (embed, width), "down": (width, embed)}
    weights = {
        name: jnp.asarray(rng.normal(size=(2, experts, *shape)) / shape[0] ** 0.5, dtype)
        for name, shape in shapes.items()
    }
    return weights | {"layer": jnp.int32(1), "router": jnp.zeros((embed, experts))}


def in_int8(rng, weights):
    """The same shapes in int8, with a scale of its own for each channel of an expert."""
    stacks = {name: weights[name] for name in ("gate", "up", "down")}
    scales = {
        f"{name}_scale": jnp.asarray((0.5 + rng.random((*w.shape[:2], 1, w.shape[3]))) / 127 / w.shape[2] ** 0.5)
        for name, w in stacks.items()
    }
    integers = {name: jnp.asarray(rng.integers(-127, 128, w.shape), jnp.int8) for name, w in stacks.items()}
    return weights | integers | jax.tree.map(lambda scale: scale.astype(jnp.float32), scales)


def dequantized(weights, dtype):
    stacks = {name: weights[name].astype(jnp.float32) * weights[f"{name}_scale"] for name in ("gate", "up", "down")}
    return {name: weights[name] for name in ("layer", "router")} | {name: w.astype(dtype) for name, w in stacks.items()}


def choices(rng, tokens, k, experts):
    """Different experts for each token, int32 [k, tokens], and weights."""
    experts = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)], axis=1)
    return jnp.asarray(experts, jnp.int32), jnp.asarray(rng.random((k, tokens)), jnp.float32)


def sorted_sums(x, experts, expert_weights, weights, elsewhere=False):
    move = sort_by_expert(experts, weights["gate"].shape[1], elsewhere)
    return combine_in_stacks(x, move, expert_weights, weights), move.group_sizes


@pytest.mark.parametrize(
    ("dtype", "embed", "tokens", "tolerance"),
    [(jnp.float32, 1024, 48, 1e-5), (jnp.float32, 2048, 16, 1e-5), (jnp.bfloat16, 2048, 32, 2e-2)],
)
def test_equals_sorted_matmuls(dtype, embed, tokens, tolerance):
    rng = np.random.default_rng(0)
    weights, x = layer(rng, 8, embed, dtype=dtype), jnp.asarray(rng.normal(size=(tokens, embed)), dtype)
    routed = choices(rng, tokens, 3, 8)
    expected, load = sorted_sums(x, *routed, weights)
    found, own_load = fused_experts.fused_experts(x, *routed, weights, interpret=True)
    assert found.dtype == dtype and np.array_equal(load, own_load)
    difference = np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32))
    assert difference.max() <= tolerance * np.abs(np.asarray(expected, np.float32)).max()


@pytest.mark.parametrize(
    ("dtype", "cut", "tolerance"),
    [(jnp.float32, (1, 1, 2), 1e-5), (jnp.float32, (1, 2, 1), 1e-5), (jnp.bfloat16, (1, 1, 2), 2e-2)],
)
def test_int8_equals_sorted_matmuls_and_the_float_weights(dtype, cut, tolerance):
    rng = np.random.default_rng(4)
    embed = 1024 * 4 // jnp.dtype(dtype).itemsize
    weights = in_int8(rng, layer(rng, 4, embed, width=256))
    x, routed = jnp.asarray(rng.normal(size=(16, embed)), dtype), choices(rng, 16, 2, 4)
    found, load = fused_experts.fused_experts(x, *routed, weights, fused_experts.Cut(*cut), interpret=True)
    assert found.dtype == dtype
    for expected, sizes in (sorted_sums(x, *routed, w) for w in (weights, dequantized(weights, dtype))):
        assert np.array_equal(load, sizes)
        difference = np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32))
        assert difference.max() <= tolerance * np.abs(np.asarray(expected, np.float32)).max()


@pytest.mark.parametrize("kernel", ["xla", "megablox"])
def test_sorted_matmuls_of_int8_equal_those_of_the_float_weights(kernel):
    rng = np.random.default_rng(5)
    weights = in_int8(rng, layer(rng, 4, 64, width=32))
    x, routed = jnp.asarray(rng.normal(size=(24, 64)), jnp.float32), choices(rng, 24, 2, 4)
    move = sort_by_expert(routed[0], 4, False, kernel, True)
    found = combine_in_stacks(x, move, routed[1], weights, kernel, True)
    assert np.allclose(found, sorted_sums(x, *routed, dequantized(weights, jnp.float32))[0], atol=1e-5)


def test_one_expert_for_all_and_none_for_most():
    """Expert 5 gets several tiles; of 8 experts, two get rows."""
    rng = np.random.default_rng(1)
    weights, x = layer(rng, 8, 1024), jnp.asarray(rng.normal(size=(48, 1024)), jnp.float32)
    experts = jnp.stack([jnp.full(48, 5), jnp.full(48, 2)]).astype(jnp.int32)
    routed = experts, jnp.asarray(rng.random((2, 48)), jnp.float32)
    assert fused_experts.tile_rows(experts.size / 8) < 48
    found, load = fused_experts.fused_experts(x, *routed, weights, interpret=True)
    assert load.tolist() == [0, 0, 48, 0, 0, 48, 0, 0]
    assert np.allclose(found, sorted_sums(x, *routed, weights)[0], atol=1e-5)


def test_experts_on_other_ranks_add_nothing():
    rng = np.random.default_rng(2)
    weights, x = layer(rng, 4, 1024), jnp.asarray(rng.normal(size=(16, 1024)), jnp.float32)
    experts, expert_weights = choices(rng, 16, 3, 8)
    routed = experts - 2, expert_weights
    found, load = fused_experts.fused_experts(x, *routed, weights, interpret=True)
    expected, sizes = sorted_sums(x, *routed, weights, elsewhere=True)
    assert np.array_equal(load, sizes) and load.sum() < experts.size
    assert np.allclose(found, expected, atol=1e-5)
    nobody = jnp.full_like(experts, -1)
    found, load = fused_experts.fused_experts(x, nobody, expert_weights, weights, interpret=True)
    assert not load.any() and not found.any()


@pytest.mark.parametrize(("experts", "stored"), [("megablox", "float32"), ("xla", "float32"), ("megablox", "int8")])
def test_a_pass_of_decoding_uses_it_where_it_is_asked_for(experts, stored, monkeypatch):
    config = preset("tiny_moe").replace(hidden_size=1024, num_layers=2, moe_intermediate_size=128)
    params = parameters.initialize(config, jax.random.key(0))
    params = quantize_experts(params, config) if stored == "int8" else params

    def cached(key, layers):
        return jax.random.normal(jax.random.key(key), (layers, 2, config.num_kv_heads, 32, config.head_dim))

    groups = config.layer_groups.items()
    cache = {group: {"key": cached(1, len(layers)), "value": cached(2, len(layers))} for group, layers in groups}
    tokens, positions = jnp.arange(16).reshape(2, 8), jnp.broadcast_to(16 + jnp.arange(8), (2, 8))
    visibility, calls, kernel = block_window(jnp.array([16, 8]), 8), [], fused_experts.fused_experts
    monkeypatch.setattr(fused_experts, "fused_experts", lambda *a: calls.append(1) or kernel(*a))

    def run(execution):
        return hidden_states(params, config, tokens, positions, visibility, execution, cache)[0]

    found = run(Execution(experts=experts, interpret=True))
    assert bool(calls) == (experts == "megablox")
    assert np.allclose(found, run(Execution()), atol=2e-5)


@pytest.mark.parametrize(
    ("topology", "tokens", "embed", "width", "cut"),
    [
        ("v5p:2x2x1", 4096, 2048, 128, (1, 1, 2)),  # LLaDA2.0-mini, its experts split over four chips
        ("v5p:2x2x1", 8192, 2048, 128, (2, 1, 2)),
        ("v5p:2x2x1", 4096, 2048, 512, (1, 1, 1)),  # shared out whole
        ("v5p:2x2x1", 1024, 4096, 1024, (1, 2, 1)),  # -flash
        ("v4:2x2x1", 256, 2048, 128, (1, 1, 2)),
        ("v4:2x2x1", 8192, 2048, 128, None),
        ("v6e:2x2", 4096, 2048, 128, (1, 1, 2)),
        ("v6e:2x2", 16384, 2048, 128, None),  # its pairs do not fit scalar memory
    ],
)
def test_tokens_and_widths_are_cut_to_fit_fast_memory(topology, tokens, embed, width, cut):
    with jax.set_mesh(one_device(parse_topology(topology))):
        assert fused_experts.fused_cut(tokens, embed, width, tokens * 8, 256, jnp.bfloat16) == cut


@pytest.mark.parametrize(
    ("topology", "tokens", "embed", "width", "cut"),
    [
        ("v5p:2x2x1", 4096, 2048, 512, (1, 1, 2)),  # two pieces ahead where bfloat16 has room for one
        ("v5p:2x2x1", 1024, 4096, 1024, (1, 1, 1)),  # whole experts where bfloat16 has halves
    ],
)
def test_int8_takes_half_of_the_room(topology, tokens, embed, width, cut):
    with jax.set_mesh(one_device(parse_topology(topology))):
        sizes = tokens, embed, width, tokens * 8, 256, jnp.bfloat16
        assert fused_experts.fused_cut(*sizes, stored=jnp.int8) == cut
        assert fused_experts.fused_cut(*sizes, stored=jnp.bfloat16) == fused_experts.fused_cut(*sizes) != cut


def test_tokens_must_be_whole_registers():
    assert fused_experts.fused_cut(32, 2048, 128, 64, 8, jnp.bfloat16, interpret=True) == (1, 1, 2)
    for tokens, embed, width in ((8, 2048, 128), (32, 1024, 128), (32, 2048, 64)):
        assert fused_experts.fused_cut(tokens, embed, width, 64, 8, jnp.bfloat16, interpret=True) is None


@pytest.mark.parametrize("cut", [(2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_parts_and_pieces_add_up(cut):
    rng = np.random.default_rng(3)
    weights, x = layer(rng, 4, 1024, width=256), jnp.asarray(rng.normal(size=(32, 1024)), jnp.float32)
    routed = choices(rng, 32, 2, 4)
    whole, load = fused_experts.fused_experts(x, *routed, weights, interpret=True)
    found, loads = fused_experts.fused_experts(x, *routed, weights, fused_experts.Cut(*cut), interpret=True)
    assert np.array_equal(load, loads) and np.allclose(whole, found, atol=1e-5)


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_it_compiles_and_reads_weights_in_place(topology, stored):
    tokens, experts, embed = 128, 16, 2048
    mesh = one_device(parse_topology(topology))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=replicated)

    def run(x, experts, expert_weights, stacks):
        weights = stacks | dict(layer=1, router=jnp.zeros((embed, 16)))
        return fused_experts.fused_experts(x, experts, expert_weights, weights)[0]

    into, out = shape(3, experts, embed, 128, dtype=stored), shape(3, experts, 128, embed, dtype=stored)
    stacks = dict(gate=into, up=into, down=out)
    if stored == "int8":
        scales = {f"{name}_scale": shape(3, experts, 1, w.shape[3], dtype=jnp.float32) for name, w in stacks.items()}
        stacks |= scales
    routed = (shape(4, tokens, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(shape(tokens, embed), *routed, stacks).compile()
    assert program.memory_analysis().temp_size_in_bytes < experts * embed * 128 * into.dtype.itemsize / 2


def test_more_tokens_than_scalar_memory_lists_go_in_several_calls():
    with jax.set_mesh(one_device(parse_topology("v5p:2x2x1"))):
        assert fused_experts.fused_calls(8192, 2048, 512, 8192 * 8, 256, jnp.bfloat16) == (1, (2, 1, 1))
        assert fused_experts.fused_calls(16384, 2048, 512, 16384 * 8, 256, jnp.bfloat16) == (2, (2, 1, 1))
        assert fused_experts.fused_calls(8192 + 16, 2048, 500, 8192 * 8, 256, jnp.bfloat16) is None
    rng = np.random.default_rng(4)
    weights, x = layer(rng, 4, 1024), jnp.asarray(rng.normal(size=(64, 1024)), jnp.float32)
    routed = choices(rng, 64, 2, 4)
    whole, load = fused_experts.fused_experts(x, *routed, weights, interpret=True)
    found, loads = fused_experts.fused_in_calls(2, x, *routed, weights, interpret=True)
    assert np.array_equal(load, loads) and np.allclose(whole, found, atol=1e-5)


@pytest.mark.parametrize("fitting", [(2, (1, 1, 2)), (1, (2, 1, 1))])
def test_ranks_exchange_tokens_group_by_group(fitting, monkeypatch):
    """Two ranks, as many groups as the kernel takes calls and parts: the sums of one device, and its load."""
    rng = np.random.default_rng(6)
    config = preset("tiny_moe").replace(hidden_size=1024, moe_intermediate_size=128, num_shared_experts=0)
    stacks = layer(rng, config.num_experts, 1024)
    weights = {name: stacks[name] for name in ("gate", "up", "down")} | {"layer": jnp.int32(1)}
    weights["router"] = jnp.asarray(rng.normal(size=(1024, config.num_experts)), jnp.float32)
    weights["expert_bias"] = jnp.zeros(config.num_experts)
    axes = parameters.layer_axes(config, "sparse", {name: weights[name] for name in weights if name != "layer"})
    axes |= {name: ("layers", *axes[name]) for name in ("gate", "up", "down")} | {"layer": ()}
    x = jnp.asarray(rng.normal(size=(2, 32, 1024)), jnp.float32)
    sizes = []

    def fixed(tokens, *_):
        sizes.append(tokens)
        return fitting[0], fused_experts.Cut(*fitting[1])

    monkeypatch.setattr(experts_module, "fused_calls", fixed)

    def run(execution):
        def moe(inputs, weights, shards):
            y, load = experts_module.moe(inputs, weights, shards, config, execution)
            return y, load[None]

        y, load = jax.jit(sharding.over_batch(moe, axes))((x, x), weights)
        return y, load.sum((0, 1))

    how = dict(experts="megablox", interpret=True)
    expected, loads = run(Execution())
    with jax.set_mesh(sharding.make_mesh(data=1, expert=2, devices=jax.devices()[:2])):
        found, load = run(Execution(**how, expert_parallel="gather_tokens"))
    assert sizes == [64]
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max()) and np.array_equal(load, loads)
