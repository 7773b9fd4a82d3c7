#!/usr/bin/env bash
# libtpu 0.0.42.1 with jax 0.10.2, and libtpu 0.0.52 with jax 0.12.0.1 (PyPI), compiling ahead of time for a v6e:2x4;
# with Python 3.12, and no TPU.
#
# The published training recipes for v6e (Llama 3.1, Mistral, Mixtral) set --xla_tpu_enable_async_collective_fusion and
# --xla_tpu_enable_async_collective_fusion_fuse_all_gather, "continuation fusion" of gathers.
# Expected: newer compilers take the flags of the published numbers, or ignore them.
# Seen: 0.0.42.1 compiles with them; 0.0.52 refuses every program with a gather to fuse:
#   FAILED_PRECONDITION: Continuation fusion for AllGather is enabled on platform ghostlite ... not
#   supported/recommended on platforms other than TPU v5e
# So the steps that those recipes timed are to be compiled with a compiler of their time, or without the flags.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >gather.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))


def split(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))


def layers(x, weights):  # as in training: each layer's weights are gathered, under a loop
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, weights)[0]


weights = jax.ShapeDtypeStruct(
    (8, 2, 4096, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
)
try:
    jax.jit(layers).lower(split(65536, 4096), weights).compile()
    print(jax.__version__, "compiles")
except jax.errors.JaxRuntimeError as error:
    print(jax.__version__, str(error).split(" is enabled")[0])
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
export LIBTPU_INIT_ARGS="--xla_tpu_enable_async_collective_fusion=true --xla_enable_async_all_gather=true"
LIBTPU_INIT_ARGS+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
LIBTPU_INIT_ARGS+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
LIBTPU_INIT_ARGS+=" --xla_tpu_overlap_compute_collective_tc=true"
seen=""
for packages in "jax==0.10.2 libtpu==0.0.42.1" "jax==0.12.0.1 libtpu==0.0.52"; do
  python3.12 -m venv --clear "$work/venv"
  # shellcheck disable=SC2086  # two packages
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check $packages
  seen+="$("$work/venv/bin/python" gather.py 2>/dev/null); "
done
echo "$seen"
[ "$seen" = "0.10.2 compiles; 0.12.0.1 FAILED_PRECONDITION: Continuation fusion for AllGather; " ]
