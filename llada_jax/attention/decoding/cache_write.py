"""Writes keys and values of finished blocks, or of chunks of prompts, into the caches of decoding, in place.

Anywhere by a loop over the rows that have some, and on TPUs by a kernel that starts the copies of all rows at once.
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
    interpret: bool = False, rows: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Returns the cache with `block` at positions `at` [rows] int32, in the `selected` rows (bool [rows]) only.

    cache [layers, rows, kv_heads, positions, head_dim]; block: with fewer positions, and without the cache's padding.
    kernel: use it where it can run: if blocks are whole tiles, of the cache's dtype; then `at` must be multiples of
    ALIGNED. interpret: on any device, slowly. rows: of the cache, for those of `block`, `at` and `selected`, which then
    are one for each part of the mesh, as in cache_rows.take_rows; None: all, in their order.
    """
    rows = jnp.arange(cache.shape[1]) if rows is None else rows
    whole = block.shape[3] % ALIGNED == 0 and block.shape[4] == cache.shape[4] and block.shape[4] % LANES == 0
    run = _write_rows
    if kernel and whole and block.dtype == cache.dtype:
        run = functools.partial(_write_at_once, interpret=interpret)
    if (mesh := sharding.mesh_in_force()) is None:
        return run(cache, block, at, selected, rows)
    split = sharding.spec(CACHE_AXES, cache.shape, mesh)
    of_rows = PartitionSpec(split[1])

    def local(cache, block, at, selected, rows):
        return run(cache, block, at, selected, rows % cache.shape[1])

    specs = split, split, of_rows, of_rows, of_rows
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(cache, block, at, selected, rows)


def _write_rows(cache, block, at, selected, rows):
    """Row by row: an update under vmap is a scatter, for which XLA on TPUs transposes the cache and back."""
    chosen = jnp.nonzero(selected, size=selected.shape[0], fill_value=0)[0]

    def write_row(i, cache):
        row = chosen[i]
        part = lax.dynamic_slice_in_dim(block, row, 1, axis=1).astype(cache.dtype)
        return lax.dynamic_update_slice(cache, part, (0, rows[row], 0, at[row], 0))

    with jax.named_scope(WRITTEN_ROWS):
        return lax.fori_loop(0, selected.sum(), write_row, cache)


def _write_at_once(cache, block, at, selected, rows, interpret):
    num_rows, positions = block.shape[1], block.shape[3]

    def kernel(at, selected, rows, block, _, cache, done):
        def copy(row):
            place = pl.ds(pl.multiple_of(at[row], ALIGNED), positions)
            return pltpu.make_async_copy(block.at[:, row], cache.at[:, rows[row], :, place], done.at[0])

        def of_rows(function):
            lax.fori_loop(0, num_rows, lambda row, _: pl.when(selected[row] > 0)(lambda: function(copy(row))), None)

        of_rows(lambda copy: copy.start())
        of_rows(lambda copy: copy.wait())

    return launch_copies(kernel, NAME, (at, selected, rows), (block, cache), cache.shape, 1, interpret, {4: 0})


def launch_copies(kernel, name, scalars, arrays, shape, semaphores: int, interpret: bool, aliases=None) -> jax.Array:
    """Runs kernel(*scalars, *arrays, result, semaphores), which copies from arrays in HBM to a result there.

    scalars: integers, in scalar memory. shape: of the result, which has the dtype of the last array. aliases: as
    pallas_call's input_output_aliases.
    """
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    dtype = arrays[-1].dtype
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[hbm] * len(arrays),
            out_specs=hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA((semaphores,))],
        ),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=name,
    )(*(x.astype(jnp.int32) for x in scalars), *arrays)
