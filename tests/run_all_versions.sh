#!/usr/bin/env bash
# Runs the whole suite under every Python that the project supports, one after the other, each in a clone of HEAD with an
# environment of its own and the newest packages that pip finds for it. Meant for once a week, as a release of JAX may
# break what worked. Arguments go to pytest.
#
#     bash tests/run_all_versions.sh                    # 3.11, 3.12 and 3.13; about 2.4 GB of disk each while it runs
#     VERSIONS=3.13 bash tests/run_all_versions.sh -k attention
#
# Logs go to LOGS, by default a new temporary folder. Exit code 1 when a version fails or has no interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
logs=${LOGS:-$(mktemp -d -t llada_versions.XXXXXX)}
mkdir -p "$logs"

interpreter() { # VERSION: its path, from the PATH, pyenv or uv (which downloads it)
  local candidate
  for candidate in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if [ -x "$candidate" ] && "$candidate" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$1" \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  command -v uv >/dev/null || return 1
  uv python install --quiet "$1" && uv python find "$1"
}

failed=0
for version in ${VERSIONS:-3.11 3.12 3.13}; do
  log=$logs/$version.log
  if ! python=$(interpreter "$version"); then
    echo "$version: no interpreter; install it with pyenv or uv" >&2
    failed=1
    continue
  fi
  clone=$(mktemp -d -t "llada_$version.XXXXXX")
  git clone --quiet "$root" "$clone"
  echo "$version: $python, log $log"
  code=0
  (cd "$clone" && PYTHON=$python bash tests/run.sh "$@") >"$log" 2>&1 || code=$?
  packages=$("$clone/.venv/bin/python" -m pip freeze 2>/dev/null | grep -E '^(jax|jaxlib|libtpu|flax|orbax-checkpoint)==' |
    tr '\n' ' ' || true)
  echo "$version: $(tail -n 1 "$log") (exit code $code; $packages)"
  [ "$code" -eq 0 ] || failed=1
  rm -rf "$clone"
done
exit "$failed"
