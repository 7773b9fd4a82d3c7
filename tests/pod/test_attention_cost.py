"""What attention costs in rows so short that a kernel around it takes one step."""

import pytest

from llada_jax.chips import parse_topology
from llada_jax.pod.attention_cost import Shape, kernel_costs
from llada_jax.pod.hlo import Array

AROUND = [f"attention_{name}" for name in ("query_tiles", "query_rows", "output_rows", "cotangent_tiles")]
AROUND += [f"attention_{name}_{form}" for name in ("key", "value") for form in ("tiles", "rows")]


@pytest.mark.parametrize("topology,length,halves", [("v5p:2x2x1", 2048, "both"), ("v6e:2x2", 2048, "noisy")])
def test_short_rows_of_a_small_model(topology, length, halves):
    """Heads as those of SmolLM2-135M: all keys of a row are one step of the kernels that turn them into tiles."""
    shape = Shape(length, halves, heads=9, kv_heads=3, head_dim=64, rotary_dim=64, qk_norm=False)
    topology = parse_topology(topology)
    costs = kernel_costs(shape, block_size=32, mean=1024, num_rows=2, topology=topology)
    keys = (Array("bf16", (1, shape.positions, 3 * 64)),)
    chip = topology.chip
    copies = 2 * keys[0].bytes / chip.stream_bandwidth
    for name in AROUND:
        part, cost = costs[name](keys, keys)
        assert part == "attention" and 0.999 * copies < cost.seconds < 20 * copies, name
    for name in ("forward", "backward"):
        part, cost = costs[f"block_diffusion_attention_{name}"]((), ())
        assert part == "attention" and cost.flops > 0
        assert cost.flops / (chip.peak_bf16 / chip.devices) < cost.seconds < 1e-3
