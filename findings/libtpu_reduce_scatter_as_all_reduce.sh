#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1 (PyPI), compiling ahead of time for a v5p:2x2x1; no TPU is needed.
#
# The same psum_scatter of bfloat16 [rows, 2048] over four chips, by rows. Expected in the compiled program, whatever the
# number of rows: a reduce-scatter. Seen: of 1024 rows it is one; of 4096 rows the program has no reduce-scatter, but an
# all-reduce of 4160 rows, padding included, inside a fusion that keeps 1040 of them (its backend_config names the
# emitter SingleInputAllReduceScatterFusion), and a collective-permute of 48 rows between neighbours, which puts the
# padding right. Who counts bytes by the kinds of collectives in a TPU program, as profilers' readers and cost models do,
# takes the larger one for twice its traffic.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work"
cat >scatter.py <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = jax.sharding.Mesh(np.array(devices), ("x",))


def collectives(rows):
    """Of the compiled program: kinds and shapes."""
    scatter = jax.shard_map(
        lambda x: jax.lax.psum_scatter(x, "x", tiled=True), mesh=mesh, in_specs=PartitionSpec(None, "x"),
        out_specs=PartitionSpec("x"), check_vma=False,
    )
    x = jax.ShapeDtypeStruct((rows, 4 * 2048), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "x")))
    text = jax.jit(scatter).lower(x).compile().as_text()
    found = re.findall(r"= \(?bf16\[([\d,]+)\]\S*.* (all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", text)
    return ", ".join(sorted(f"{kind} [{shape}]" for shape, kind in found))


for rows in (1024, 4096):
    print(f"{rows} rows: {collectives(rows)}")
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
seen=$(venv/bin/python scatter.py 2>/dev/null)
echo "$seen"
[ "$seen" = "1024 rows: reduce-scatter [256,2048]
4096 rows: all-reduce [4160,2048], collective-permute [48,2048]" ]
