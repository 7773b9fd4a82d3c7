"""The counts behind tools/bench.py experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.bench import experts
from llada_jax.chips import CHIPS
from llada_jax.errors import InputError
from llada_jax.model import grouped_tiles
from llada_jax.model.config import preset
from llada_jax.model.grouped_matmul import megablox
from llada_jax.pod import experts_cost


@pytest.mark.parametrize("sizes", [[5, 0, 11, 16], [0, 0, 32], [16, 16], list(experts_cost.group_sizes(512, 40))])
def test_tile_visits_are_the_kernel_s_own(sizes):
    rows, tile = sum(sizes), 8
    _, visits = megablox.make_group_metadata(
        group_sizes=jnp.asarray(sizes, jnp.int32), m=rows, tm=tile, start_group=jnp.int32(0),
        num_nonzero_groups=len(sizes), visit_empty_groups=False,
    )  # fmt: skip
    assert experts_cost.tile_visits(np.array(sizes), tile) == visits


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("model", ["llada2_mini", "llada2_flash", "qwen3_30b_a3b"])
def test_tiles_fit_and_keep_both_cores_busy(chip, model):
    for contracted, columns in experts_cost.matmuls(preset(model)).values():
        for choose in (grouped_tiles.rows_times_groups, grouped_tiles.group_gradients):
            for k, n in ((contracted, columns), (columns, contracted)):
                rows, part, width = choose(2**18, k, n, chip.device_kind)
                assert n % width == 0 and k % part == 0 and 2**18 % rows == 0
                assert n // width >= chip.cores_per_device
                assert 2 * 2 * part * width <= 8 * 2**20


def test_unknown_devices_and_implementations_are_refused():
    with pytest.raises(InputError, match="no tile sizes for cpu"):
        grouped_tiles.rows_times_groups(128, 128, 128, "cpu")
    with pytest.raises(InputError, match="--implementations=x"):
        experts.check_implementations(["x"])


def test_megablox_is_costed_by_its_schedule():
    sizes = experts_cost.group_sizes(experts_cost.TOKENS * 8, 256)
    cost = experts_cost.kernel_cost("megablox", "forward", sizes, 2048, 1024, "v5p:2x2x1")
    assert cost.tile == (128, 2048, 512) and cost.steps > 2 * 2**18 / 128
    # No more than the tiles on the borders of experts, and a tenth, is lost.
    floor = cost.steps * 128 * 2048 * 512 / CHIPS["v5p"].macs_per_cycle / 2
    assert floor <= cost.cycles <= 1.1 * floor
    assert 0.8 < cost.peak_share < 1 and 0 < cost.dma_cycles < cost.cycles
