#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1 (PyPI), CPU: a program that JAX loads from its persistent compilation cache, then saved with
# jax.experimental.serialize_executable.
#
# Expected: what is saved is the program, wherever it came from, or saving it is refused.
# Seen: serialize and deserialize_and_load raise nothing, but calling the result fails. So a script that saves its
# compiled step works on its first run and breaks on its second:
#   cache hit: False, saved program: runs
#   cache hit: True, saved program: JaxRuntimeError NOT_FOUND: Function wrapped_sine not found (type id: 1)
# (or INTERNAL: Error dispatching computation: Function wrapped_sine not found, where the wait is for a sum of it)
# Compiling with jax_enable_compilation_cache off (and compilation_cache.reset_cache()) saves a program that runs.
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'jax[cpu]==0.10.2'
cd "$work"
cat >save.py <<'PY'
import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
x = jnp.ones((8, 8))
compiled = jax.jit(lambda x: jnp.sin(x) @ x.T + jnp.cumsum(x, 0)).lower(x).compile()
again = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
compiled(x).block_until_ready()  # the program itself runs, however it came
try:
    again(x).block_until_ready()
    found = "runs"
except Exception as error:
    found = f"{type(error).__name__} {error}"
print(f"cache hit: {bool(hits)}, saved program: {found}")
PY
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$work/cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
first=$(venv/bin/python save.py)
second=$(venv/bin/python save.py)
printf '%s\n%s\n' "$first" "$second"
[ "$first" = "cache hit: False, saved program: runs" ] &&
  [[ "$second" == "cache hit: True, saved program: JaxRuntimeError"*"not found"* ]]
