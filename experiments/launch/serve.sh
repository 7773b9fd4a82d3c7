#!/usr/bin/env bash
# Serves a checkpoint on this host, a TPU VM: installs, copies the checkpoint, and has systemd run tools/serve.py.
#
#   serve.sh CHECKPOINT KEYS SERVE_FLAGS...
#
# CHECKPOINT: gs://BUCKET/FOLDER, copied to this host's disk, or a folder of it. What was copied from there before is not
# copied again: give other weights another name. KEYS: a file of API keys, one a line.
# Run again, with other flags, another checkpoint or newer code, it does the same anew. It ends with 0 when the server is
# healthy, with 1 when it is not within SERVE_WAIT seconds, with 2 at bad input, and with 42 when another try may go
# better. systemd starts the server at each boot, and again after any end but a stop or bad input. A stop lets it finish
# what runs, for SERVE_GRACE seconds at most.
set -euo pipefail
usage="usage: serve.sh CHECKPOINT KEYS SERVE_FLAGS..."
checkpoint=${1:?$usage}
keys=${2:?$usage}
shift 2
etc=${SERVE_ETC:-/etc/llada_jax}
units=${SERVE_UNITS:-/etc/systemd/system}
data=${SERVE_DATA:-/var/lib/llada_jax}
grace=${SERVE_GRACE:-120}
wait=${SERVE_WAIT:-1800} # for a checkpoint to be read and programs to compile
port=8000
unit=llada_jax_serve

say() { printf '%s serve: %s\n' "$(date -u +%FT%TZ)" "$1" | tee -a "$log" >&2; }
bad_input() {
  echo "error: $1" >&2
  exit 2
}

[ -s "$keys" ] || bad_input "$keys: no file of keys"
for word in "$checkpoint" "$@"; do # which systemd would take for something else
  [[ $word =~ ^[A-Za-z0-9_./:,=@+-]+$ ]] || bad_input "'$word': a character that the unit of systemd cannot hold"
  [[ $word != --port=* ]] || port=${word#--port=}
done
mkdir -p "$etc" "$data"
install -m 600 "$keys" "$etc/keys"
cd "$(dirname "$0")/../.."
log=$data/install.log
# shellcheck source=experiments/launch/install.sh
. experiments/launch/install.sh
installed || bad_input "neither python3.11 nor python3 on this image"

case $checkpoint in
gs://*)
  folder=$data/checkpoints/${checkpoint#gs://}
  final=2 retried .venv/bin/python experiments/launch/fetch.py --source="$checkpoint" --out="$folder"
  [ "$code" = 0 ] || bad_input "$checkpoint: see the line above"
  ;;
*) folder=$(realpath "$checkpoint") ;;
esac

cat >"$units/$unit.service" <<END
[Unit]
Description=llada_jax over HTTP
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
WorkingDirectory=$PWD
Environment=HOME=/root JAX_COMPILATION_CACHE_DIR=$data/programs
ExecStart=$PWD/.venv/bin/python tools/serve.py --checkpoint=$folder --host=0.0.0.0 --port=$port --api_key_file=$etc/keys --grace=$grace $*
Restart=always
RestartPreventExitStatus=2
RestartSec=5
KillMode=mixed
TimeoutStopSec=$((grace + 30))

[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
systemctl enable --quiet "$unit"
systemctl restart "$unit"
until curl --fail --silent --show-error --max-time 5 "http://localhost:$port/health" 2>/dev/null; do
  if systemctl is-failed --quiet "$unit" || [ "$SECONDS" -gt "$wait" ]; then
    say "the server is not healthy: journalctl --unit=$unit says why"
    exit 1
  fi
  sleep "${SERVE_POLL:-5}"
done
say "healthy at port $port"
