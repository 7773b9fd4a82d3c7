#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1 (PyPI), compiling ahead of time for a v5p:4x4x4 whose sides wrap; no TPU is needed.
#
# One all_gather over two mesh axes of 8 devices each, of an array that is split over both: all 64 devices take part,
# whatever the axes are made of. Expected: an all-gather, for any order of the devices. Seen: in the order that
# mesh_utils.create_device_mesh gives for (8, 8) with allow_split_physical_axes=True, where both axes share sides of the
# torus, the program has no all-gather, but zeros of the full size (a broadcast) and an all-reduce of them, which sends
# twice the bytes. In the order of create_device_mesh((64,)), reshaped to (8, 8), it is an all-gather. A program that
# shards a weight over two axes of a mesh (fsdp and context, say) pays for the order.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work"
cat >gather.py <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4", wrap=(True, True, True))
devices = list(slice_.devices)


def kinds(places):
    """Operations of the compiled program."""
    mesh, both = Mesh(places, ("a", "b")), PartitionSpec(("a", "b"))
    gather = jax.shard_map(
        lambda x: jax.lax.all_gather(x, ("a", "b"), tiled=True), mesh=mesh, in_specs=both, out_specs=PartitionSpec(),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, both))
    text = jax.jit(gather).lower(x).compile().as_text()
    return ", ".join(sorted(set(re.findall(r" (all-reduce|all-gather|broadcast)(?:-start)?\(", text))))


print("as (8, 8):", kinds(mesh_utils.create_device_mesh((8, 8), devices=devices, allow_split_physical_axes=True)))
print("as (64,):", kinds(mesh_utils.create_device_mesh((64,), devices=devices).reshape(8, 8)))
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
seen=$(venv/bin/python gather.py 2>/dev/null)
echo "$seen"
[ "$seen" = "as (8, 8): all-reduce, broadcast
as (64,): all-gather" ]
