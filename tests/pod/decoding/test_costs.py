"""Costs of the kernels of decoding: they grow with what the kernels do, and are never below their bytes."""

import jax
import pytest

from llada_jax.chips import parse_topology
from llada_jax.model.fused_experts import Cut
from llada_jax.pod.decoding import cached_attention_cost, fused_experts_cost, prefix_cost, projections_cost
from llada_jax.pod.topology import one_device

TOPOLOGY = parse_topology("v5p:2x2x1")
CHIPS = ["v4:2x2x1", "v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"]


def cost(costs):
    ((part, found),) = (of((), ()) for of in costs.values())
    return part, found


@pytest.mark.parametrize("name", CHIPS)
def test_attention_costs_the_chunks_that_are_filled(name):
    topology = parse_topology(name)
    shape = cached_attention_cost.Shape(rows=4, queries=64, length=2048, heads=4, kv_heads=1, head_dim=128)
    (part, empty), (_, half), (_, full) = (
        cost(cached_attention_cost.kernel_costs(shape, filled, topology)) for filled in (0, 1024, 2048)
    )
    assert part == "attention" and 0 < empty.seconds < half.seconds < full.seconds
    a_chunk = (full.seconds - half.seconds) / 2
    assert a_chunk < empty.seconds  # which has the first chunk, own keys, and all that is done once
    read = 4 * 2048 * 128 * 2 * 2
    assert full.seconds >= read / topology.chip.stream_bandwidth
    assert full.flops == 4 * (4 * 64) * (2048 + 64) * 128 * 4


def test_a_chunk_of_a_prompt_costs_the_keys_that_it_sees():
    shape = prefix_cost.Shape(512, 4096, heads=8, kv_heads=2, head_dim=128, rotated=32, qk_norm=True)
    found = {}
    for filled in (0, 2048):
        costs = prefix_cost.kernel_costs(shape, filled, 32, TOPOLOGY)
        found[filled] = [costs[name]((), ()) for name in ("block_diffusion_attention_forward", "prefix_keys")]
    for (part, few), (_, many) in zip(found[0], found[2048], strict=True):
        assert part == "attention" and 0 < few.seconds < many.seconds
    attention, copied = (cost for _, cost in found[2048])
    assert attention.flops == 4 * 8 * 128 * 512 * (2048 + (512 + 32) / 2)
    assert attention.seconds > attention.flops / TOPOLOGY.chip.peak_bf16
    assert copied.seconds == pytest.approx(2 * 2 * 2560 * 2 * 128 / TOPOLOGY.chip.stream_bandwidth)


@pytest.mark.parametrize("name", CHIPS)
def test_projections_cost_their_weights_once_per_block(name):
    topology = parse_topology(name)
    rotated = 64 if name == "v6e:2x2" else 32  # all channels, or half of them
    sizes = dict(positions=64, embed=1024, heads=8, kv_heads=2, head_dim=128, rotated=rotated)
    costs = {}
    for rows in (4, 16):
        shape = projections_cost.Shape(rows=rows, **sizes)
        with jax.set_mesh(one_device(topology)):
            tilings = shape.tilings()
        (of,) = projections_cost.kernel_costs(shape, tilings, topology).values()
        costs[rows] = [of(result, ()) for result in ((1, 2, 3), (1,))]
    for which, weights in ((0, 1024 * 12 * 128), (1, 1024 * 8 * 128)):
        (part, few), (_, many) = (costs[rows][which] for rows in (4, 16))
        assert part == "dense" and few.flops == 2 * 256 * weights and many.flops == 4 * few.flops
        assert few.seconds >= 2 * weights / topology.chip.stream_bandwidth
        assert few.seconds < many.seconds < 4.5 * few.seconds


def test_projections_whose_loop_is_less_than_half_of_the_kernel():
    """LLaDA2.0-flash on v6e:4x4, four requests."""
    topology = parse_topology("v6e:4x4")
    shape = projections_cost.Shape(rows=1, positions=64, embed=4096, heads=8, kv_heads=1, head_dim=128, rotated=32)
    with jax.set_mesh(one_device(topology)):
        tilings = shape.tilings()
    (of,) = projections_cost.kernel_costs(shape, tilings, topology).values()
    for result, weights in (((1, 2, 3), 4096 * 10 * 128), ((1,), 4096 * 8 * 128)):
        part, found = of(result, ())
        floor = 2 * weights / topology.chip.stream_bandwidth
        assert part == "dense" and floor <= found.seconds < 4 * floor


def test_experts_cost_their_weights_once_per_part():
    shape = fused_experts_cost.Shape(tokens=256, embed=2048, width=128, experts=64, all_experts=64, k=8)
    part, whole = cost(fused_experts_cost.kernel_costs(shape, Cut(), TOPOLOGY))
    weights = 64 * 3 * 2048 * 128 * 2
    assert part == "experts" and whole.seconds >= weights / TOPOLOGY.chip.stream_bandwidth
    _, cut = cost(fused_experts_cost.kernel_costs(shape, Cut(parts=2), TOPOLOGY))
    assert cut.seconds >= 2 * weights / TOPOLOGY.chip.stream_bandwidth
    # Three products of all rows; the last tile of an expert is not full.
    assert whole.flops >= 2 * 256 * 8 * 3 * 2048 * 128


@pytest.mark.parametrize("tokens", [16, 300])
def test_rows_of_an_expert_are_binomial(tokens):
    shape = fused_experts_cost.Shape(tokens=tokens, embed=2048, width=128, experts=8, all_experts=32, k=4)
    rows, chance = fused_experts_cost._rows(shape)
    assert chance.sum() == pytest.approx(1) and rows @ chance == pytest.approx(tokens / 8)
    assert chance[0] == pytest.approx((1 - 4 / 32) ** tokens)
