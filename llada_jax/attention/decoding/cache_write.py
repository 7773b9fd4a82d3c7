"""Writes the keys and values of finished blocks into the caches of decoding, in place, in the rows that have one.

Anywhere by a loop over those rows, and on TPUs by a kernel that starts the copies of all rows at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention.decoding.cached import CACHE_AXES, SCOPE
from llada_jax.attention.decoding.cached_kernel import ALIGNED, LANES

NAME = "cache_write"
WRITTEN_ROWS = "written_rows"  # scope of the loop over rows


@jax.named_scope(SCOPE)
def write_blocks(
    cache: jax.Array, block: jax.Array, at: jax.Array, selected: jax.Array, kernel: bool = False,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Returns the cache with `block` at positions `at` [rows] int32, in the `selected` rows (bool [rows]) only.

    cache [layers, rows, kv_heads, positions, head_dim]; block: with fewer positions, and without the cache's padding.
    kernel: use it where it can run: if blocks are whole tiles, of the cache's dtype. interpret: on any device, slowly.
    """
    whole = block.shape[3] % ALIGNED == 0 and block.shape[4] == cache.shape[4] and block.shape[4] % LANES == 0
    run = _write_rows
    if kernel and whole and block.dtype == cache.dtype:
        run = functools.partial(_write_at_once, interpret=interpret)
    if (mesh := sharding.mesh_in_force()) is None:
        return run(cache, block, at, selected)
    split = sharding.spec(CACHE_AXES, cache.shape, mesh)
    rows = PartitionSpec(split[1])
    run = jax.shard_map(run, in_specs=(split, split, rows, rows), out_specs=split, check_vma=False)
    return run(cache, block, at, selected)


def _write_rows(cache, block, at, selected):
    """Row by row: an update under vmap is a scatter, for which XLA on TPUs transposes the cache and back."""
    rows = jnp.nonzero(selected, size=selected.shape[0], fill_value=0)[0]

    def write_row(i, cache):
        row = rows[i]
        part = lax.dynamic_slice_in_dim(block, row, 1, axis=1).astype(cache.dtype)
        return lax.dynamic_update_slice(cache, part, (0, row, 0, at[row], 0))

    with jax.named_scope(WRITTEN_ROWS):
        return lax.fori_loop(0, selected.sum(), write_row, cache)


def _write_at_once(cache, block, at, selected, interpret):
    rows, positions = block.shape[1], block.shape[3]

    def kernel(at, selected, block, _, cache, done):
        def copy(row):
            place = pl.ds(pl.multiple_of(at[row], ALIGNED), positions)
            return pltpu.make_async_copy(block.at[:, row], cache.at[:, row, :, place], done.at[0])

        def of_rows(function):
            lax.fori_loop(0, rows, lambda row, _: pl.when(selected[row] > 0)(lambda: function(copy(row))), None)

        of_rows(lambda copy: copy.start())
        of_rows(lambda copy: copy.wait())

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    arrays = block, cache
    if not interpret:
        arrays = (pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA((1,))],
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=NAME,
    )(at.astype(jnp.int32), selected.astype(jnp.int32), *arrays)
