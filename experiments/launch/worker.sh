#!/usr/bin/env bash
# What every host of a launch runs, from the unpacked code: installs from the lock, then trains under supervision.
#
#   worker.sh WORKDIR ROWS TRAIN_FLAGS...
#
# WORKDIR: gs://BUCKET/RUN. ROWS: gs://BUCKET/ROWS, packed rows to copy to this host's disk, or "" when the flags name
# them. Run again, after a reboot or on a new machine, it goes on: the trainer resumes from WORKDIR.
# Exits 0 when the run has finished, 2 when its input is bad, and with another code below 127 when the supervisor gave
# up: these are the run's end. Else another start may go better, and GKE's JobSet (XPK 1.16: at 42 and 127 to 255) or
# systemd makes one: 143 when told to stop, 42 when installing or copying has failed WORKER_TRIES times, after waits that
# double, or when the supervisor was killed.
set -euo pipefail
workdir=${1:?usage: worker.sh WORKDIR ROWS TRAIN_FLAGS...}
rows=${2?usage: worker.sh WORKDIR ROWS TRAIN_FLAGS...}
shift 2
cd "$(dirname "$0")/../.."
folder=${LLADA_JAX_LOGS:-/tmp/llada_jax}
log=$folder/train.log
mkdir -p "$folder"
rm -f "$folder/exit_code"

say() { printf '%s worker: %s\n' "$(date -u +%FT%TZ)" "$1" | tee -a "$log" >&2; }

report() { # the end of this host's run, where launch.py --action=watch looks for it
  if command -v gcloud >/dev/null; then
    gcloud storage cp "$folder/train.log" "$workdir/hosts/$(hostname).log"
    [ ! -e "$folder/exit_code" ] || gcloud storage cp "$folder/exit_code" "$workdir/hosts/$(hostname).exit_code"
  fi
}

bad_input() { # WORDS
  say "$1"
  echo 2 >"$folder/exit_code"
  report || true
  exit 2
}

# shellcheck source=experiments/launch/install.sh
. experiments/launch/install.sh
installed || bad_input "neither python3.11 nor python3 on this image"

if [ -n "$rows" ]; then
  final=2 retried .venv/bin/python experiments/launch/fetch.py --source="$rows" --out="$folder/rows"
  [ "$code" = 0 ] || bad_input "no rows: see the line above"
  set -- "$@" --config.data.path="$folder/rows"
fi

# Not exec: the end is reported. The supervisor saves on SIGTERM, so it must get it, and be waited for.
supervisor='' told_to_stop=''
# shellcheck disable=SC2329
stop() {
  told_to_stop=yes
  [ -z "$supervisor" ] || kill -TERM "$supervisor" 2>/dev/null || true
}
trap stop TERM INT
bash experiments/launch/supervise.sh "$folder" .venv/bin/python -m llada_jax.train --workdir="$workdir" "$@" &
supervisor=$!
[ -z "$told_to_stop" ] || stop
code=0
while true; do
  wait "$supervisor" && code=0 || code=$?
  kill -0 "$supervisor" 2>/dev/null || break
done
report || true
if [ -e "$folder/exit_code" ]; then # the end, whatever the trainer's last code was
  if [ "$code" = "$again" ] || [ "$code" -ge 127 ]; then code=1; fi
elif [ -z "$told_to_stop" ]; then
  code=$again
fi
exit "$code"
