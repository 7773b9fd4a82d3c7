#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1 (PyPI), compiling ahead of time for a v5p:2x2x1; no TPU is needed.
#
# A compiled TPU program says "estimated_cycles" of each of its fusions. Expected, of an elementwise product of two
# bfloat16 arrays of 32768 x 4096: about the time that its 805 MB need at the 2.765 TB/s of a v5p, 0.29 ms.
# Seen: 2,081,792 cycles, which at the 1.75 GHz that the peak of 459 TFLOP/s implies are 1.19 ms, 4.1 times as long,
# though the operation's own schedule (128 iterations of its loop, with a ring of buffers) computes for 0.06 ms and
# copies beside it. Of a large matrix product the same field is right: 1.1 times its FLOPs at the peak.
# So the field ranks fusions against each other; summed up over a step it overstates all that only moves data.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work"
cat >estimates.py <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

CLOCK = 459e12 / (2 * 2 * 4 * 128 * 128)  # two cores of four matrix units, 128 x 128 multiply-accumulates a cycle
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = jax.sharding.Mesh(np.array(devices)[:1], ("device",))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def estimated(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / CLOCK


rows = (32768, 4096)
product = estimated(lambda a, b: a * b, rows, rows) / (3 * 2 * 32768 * 4096 / 2.765e12)
matmul = estimated(jnp.matmul, (8192, 8192), (8192, 8192)) / (2 * 8192**3 / 459e12)
print(f"estimated over ideal: elementwise product {product:.1f}, matrix product {matmul:.1f}")
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
seen=$(venv/bin/python estimates.py 2>/dev/null)
echo "$seen"
[ "$seen" = "estimated over ideal: elementwise product 4.1, matrix product 1.1" ]
