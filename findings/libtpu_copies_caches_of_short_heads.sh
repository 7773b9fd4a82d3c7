#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1 (PyPI), compiling ahead of time for a v5p:2x2x1; no TPU is needed.
#
# A Pallas kernel copies 256 positions out of a cache of keys that stays in HBM: bfloat16 [layers, rows, heads,
# positions, head_dim], a parameter of the program. Expected for any head_dim: the program reads those positions.
# Seen: with head_dim 128 it does, and needs next to no temporary memory. With head_dim 64 the program first copies the
# whole cache (403 MB of temporaries for a cache of 201 MB): XLA's default layout of an array whose last axis is shorter
# than the 128 lanes of a register puts the axis before it innermost, while the kernel takes its operands row by row,
# each padded to 128 lanes. Nothing warns. A cache padded to 128 in its last axis is as large as that copy, and is not
# copied.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work"
cat >caches.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = jax.sharding.Mesh(np.array(devices)[:1], ("device",))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def read(cache, out, done):
    copy = pltpu.make_async_copy(cache.at[1, 2, 0, pl.ds(256, 256)], out, done)
    copy.start()
    copy.wait()


def temporaries(head_dim):
    cache = jax.ShapeDtypeStruct((6, 16, 2, 8192, head_dim), jnp.bfloat16, sharding=everywhere)
    kernel = pl.pallas_call(
        read,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        out_shape=jax.ShapeDtypeStruct((256, head_dim), jnp.bfloat16),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )
    return jax.jit(kernel).lower(cache).compile().memory_analysis().temp_size_in_bytes


short, long = temporaries(64), temporaries(128)
print(f"MB of temporaries: head_dim 64 {short / 1e6:.0f}, head_dim 128 {long / 1e6:.0f}")
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
seen=$(venv/bin/python caches.py 2>/dev/null)
echo "$seen"
[ "$seen" = "MB of temporaries: head_dim 64 403, head_dim 128 0" ]
