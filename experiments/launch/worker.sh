#!/usr/bin/env bash
# What every host of a launch runs, from the unpacked code: installs from the lock, then trains under supervision.
#
#   worker.sh WORKDIR ROWS TRAIN_FLAGS...
#
# WORKDIR: gs://BUCKET/RUN. ROWS: gs://BUCKET/ROWS, packed rows to copy to this host's disk, or "" when the flags name
# them. Run again, after a reboot or on a new machine, it goes on: the trainer resumes from WORKDIR.
set -euo pipefail
workdir=${1:?usage: worker.sh WORKDIR ROWS TRAIN_FLAGS...}
rows=${2?usage: worker.sh WORKDIR ROWS TRAIN_FLAGS...}
shift 2
cd "$(dirname "$0")/../.."
folder=${LLADA_JAX_LOGS:-/tmp/llada_jax}
lock=experiments/launch/requirements.lock
mkdir -p "$folder"

report() { # the end of this host's run, where launch.py --action=watch looks for it
  if command -v gcloud >/dev/null; then
    gcloud storage cp "$folder/train.log" "$workdir/hosts/$(hostname).log"
    [ ! -e "$folder/exit_code" ] || gcloud storage cp "$folder/exit_code" "$workdir/hosts/$(hostname).exit_code"
  fi
}

stamp=.venv/installed-$(cksum <"$lock" | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  if command -v python3.11 >/dev/null; then
    python3.11 -m venv .venv
  else # TPU VM images have Python 3.10
    python3 -m pip install --quiet uv
    python3 -m uv venv --quiet --clear --seed --python 3.11 .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  touch "$stamp"
fi

if [ -n "$rows" ]; then
  .venv/bin/python experiments/launch/fetch.py --source="$rows" --out="$folder/rows"
  set -- "$@" --config.data.path="$folder/rows"
fi

# Not exec: the end is reported. The supervisor saves on SIGTERM, so it must get it, and be waited for.
bash experiments/launch/supervise.sh "$folder" .venv/bin/python -m llada_jax.train --workdir="$workdir" "$@" &
supervisor=$!
trap 'kill -TERM "$supervisor" 2>/dev/null || true' TERM INT
code=0
while true; do
  wait "$supervisor" && code=0 || code=$?
  kill -0 "$supervisor" 2>/dev/null || break
done
report || true
exit "$code"
