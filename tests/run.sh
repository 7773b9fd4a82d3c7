#!/usr/bin/env bash
# Sets up .venv, lints, and runs the tests. Arguments go to pytest: bash tests/run.sh -k noise; --soak adds the long ones.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_venv.sh test,tpu,bench  # libtpu compiles for TPUs that are not there; the baselines are tested too

bash tests/serving/install_browser.sh
ruff check .
ruff format --check .
python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
