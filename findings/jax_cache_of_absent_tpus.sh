#!/usr/bin/env bash
# jax 0.10.2 with libtpu (PyPI), no TPU: a program compiled ahead of time for the abstract devices of a TPU slice
# (jax.experimental.topologies), with the persistent compilation cache on.
#
# Expected: the second process loads the program from the cache, as on CPU or on a real TPU, or nothing is cached.
# Seen: the first process serialises the program into the cache; each later one reads the entry, fails to load it,
# warns, and compiles anew. So the cache grows and never saves a compilation:
#   entries: 1
#   UserWarning: Error reading persistent compilation cache entry for 'jit_f': JaxRuntimeError: INVALID_ARGUMENT:
#   PjRtCompiler must be constructed with a Client to call DeserializeLoadedExecutable.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax[tpu]==0.10.2'
cd "$work"
cat >compile.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def f(x):
    return x @ x


jax.jit(f).lower(jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=replicated)).compile()
PY
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
export JAX_COMPILATION_CACHE_DIR=$work/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
venv/bin/python compile.py >first.log 2>&1
echo "entries: $(find cache -name 'jit_f*-cache' | wc -l)"
venv/bin/python compile.py >second.log 2>&1
grep -o "UserWarning: Error reading persistent.*" second.log || true
[ "$(find cache -name 'jit_f*-cache' | wc -l)" -eq 1 ] && ! grep -q "Error reading persistent" first.log &&
  grep -q "must be constructed with a Client to call DeserializeLoadedExecutable" second.log
