"""The cost model against sums made by hand."""

import pytest

from llada_jax.chips import CHIPS
from llada_jax.model.config import preset
from llada_jax.model.parameters import count
from llada_jax.sampling import cost

MINI, FLASH, TINY = preset("llada2_mini"), preset("llada2_flash"), preset("tiny")


def test_a_dense_model_reads_its_weights_once_and_multiplies_each_twice_a_token():
    weights = count(TINY) - TINY.vocab_size * TINY.hidden_size  # the embedding is looked up
    found = cost.pass_cost(TINY, tokens=32, head_positions=32)
    norms = TINY.hidden_size * (2 * TINY.num_layers + 1)
    assert found.bytes == 2 * (weights - norms + 32 * TINY.hidden_size)
    assert found.flops == 2 * 32 * (weights - norms)


@pytest.mark.parametrize(
    "config, tokens, gigabytes", [(MINI, 32, 20.8), (MINI, 256, 31.8), (FLASH, 32, 132), (FLASH, 128, 201)]
)
def test_bytes_of_the_published_models_with_uniform_routing(config, tokens, gigabytes):
    assert cost.pass_cost(config, tokens, tokens).bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_the_head_and_the_cache_are_counted_apart():
    without, with_head = (cost.pass_cost(MINI, 32, positions) for positions in (0, 16))
    assert with_head.bytes - without.bytes == 2 * MINI.hidden_size * MINI.vocab_size
    assert with_head.flops - without.flops == 2 * 16 * MINI.hidden_size * MINI.vocab_size
    cached = cost.pass_cost(MINI, 32, 0, cached_tokens=1000, context=1000)
    assert cached.bytes - without.bytes == 2 * 2 * 20 * 4 * 128 * 1000
    assert cached.flops - without.flops == 4 * 20 * 16 * 128 * 1000 * 32


def test_experts_in_int8_are_half_of_their_bytes():
    both, in_int8 = (cost.pass_cost(MINI, 32, 0, bytes_per_expert_value=size) for size in (None, 1))
    experts = 19 * cost.uniform_hits(MINI, 32) * 3 * MINI.hidden_size * MINI.moe_intermediate_size
    assert both.bytes - in_int8.bytes == pytest.approx(experts) and both.flops == in_int8.flops
    # Sooner bound by arithmetic, it pays for the second block.
    kind = CHIPS["v5p"].device_kind
    prices = [cost.second_block_price(MINI, 32, 32, kind, int8_experts=int8) for int8 in (False, True)]
    assert prices[0] < prices[1]


def test_a_second_block_is_nearly_free_until_compute_bounds_the_pass():
    kind = CHIPS["v5p"].device_kind
    prices = [cost.second_block_price(MINI, rows, 32, kind) for rows in (1, 8, 64, 1024)]
    assert 0.2 < prices[0] < 0.5 and prices[1] < 0.02 and 0.8 < prices[-1] < 0.9  # all but the head
    assert cost.second_block_price(MINI, 8, 32, "some other device") == cost.UNKNOWN_PRICE
    rows = cost.compute_bound_rows(MINI, 32, CHIPS["v5p"])
    assert cost.pass_cost(MINI, 32 * rows, 16 * rows).bound(CHIPS["v5p"]) == "compute"
    assert cost.pass_cost(MINI, 16 * rows, 8 * rows).bound(CHIPS["v5p"]) == "memory"
