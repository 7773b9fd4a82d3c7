#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1 (PyPI), compiling ahead of time for a v5p:2x2x1; no TPU is needed.
#
# lax.scan over the stacked projections of 20 layers, x [256, 2048] times a layer's weight as a matrix [2048, 2048].
# Stored as [layers, embed, heads, head_dim], the usual form of JAX models, and reshaped in the loop, or stored as
# [layers, embed, heads * head_dim]. Expected: the product reads the layer where it lies, in either form. Seen: of the
# second form it does; of the first every pass of the loop begins with an operation that copies the layer's whole weight
# out of the stack, before the product. The two forms differ in their tiles: 16 heads of one input, or 16 inputs of one
# head. In training nobody sees it; a pass of decoding, which is bound by reading weights, pays for it in every layer.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work"
cat >stacks.py <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = jax.sharding.Mesh(np.array(devices)[:1], ("device",))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def copies(*shape):
    """Operations that cut a layer's whole weight out of the stack."""

    def run(x, stack):
        def layer(x, w):
            return jnp.tanh(jax.lax.optimization_barrier(x @ w.reshape(2048, 2048))), None

        return jax.lax.scan(layer, x, stack)[0]

    sizes = (256, 2048), (20, *shape)
    arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=everywhere) for size in sizes]
    text = jax.jit(run).lower(*arguments).compile().as_text()
    return len(re.findall(r"^ +%[\w.-]*(?:dynamic-slice|copy)[\w.-]* = bf16\[(?:1,)?2048,", text, re.MULTILINE))


print(f"copies of a layer's weight: by heads {copies(2048, 16, 128)}, as a matrix {copies(2048, 2048)}")
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
seen=$(venv/bin/python stacks.py 2>/dev/null)
echo "$seen"
[ "$seen" = "copies of a layer's weight: by heads 1, as a matrix 0" ]
