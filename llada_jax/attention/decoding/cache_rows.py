"""A row of each device's caches: the rows whose prompts are computed chunk by chunk.

The mesh splits the rows of a batch into parts, sharding.num_parts("batch", rows) of them; row i of a result is of part
i, so that nothing moves between devices.
"""

import jax
from jax import lax
from jax.sharding import PartitionSpec

from llada_jax import sharding
from llada_jax.attention.decoding.cached import CACHE_AXES, SCOPE


@jax.named_scope(SCOPE)
def take_rows(cache: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the caches of `rows`: int32 [parts], the i-th of part i; one out of bounds is any row of its part.

    cache [layers, rows, kv_heads, positions, head_dim]; the result has `parts` rows.
    """

    def local(cache, rows):
        return lax.dynamic_slice_in_dim(cache, rows[0] % cache.shape[1], 1, axis=1)

    if (mesh := sharding.mesh_in_force()) is None:
        return local(cache, rows)
    split = sharding.spec(CACHE_AXES, cache.shape, mesh)
    specs = split, PartitionSpec(split[1])
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(cache, rows)
