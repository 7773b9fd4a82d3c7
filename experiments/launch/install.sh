# shellcheck shell=bash disable=SC2154 # log is its reader's
# Of worker.sh and serve.sh, which read it in the root of the code: installs, and tries again what may go better then.
# Wants "say WORDS" and $log, where it tells how tries ended. Exits with 42 when WORKER_TRIES of them have failed.
tries=${WORKER_TRIES:-4}
first_wait=${WORKER_WAIT:-3} # seconds before the second try
again=42
lock=experiments/launch/requirements.lock

retried() { # COMMAND...: its exit code is in $code, 0 or the last try's; 2 is not tried again where $final says so
  local wait=$first_wait try
  for ((try = 1; ; try++)); do
    "$@" 2> >(tee -a "$log" >&2) && code=0 || code=$?
    if [ "$code" = 0 ] || [ "$code" = "${final:-0}" ]; then return; fi
    say "$1 ended with $code, try $try of $tries"
    [ "$try" -lt "$tries" ] || exit "$again"
    sleep "$wait"
    wait=$((wait * 2))
  done
}

# shellcheck disable=SC2329 # install and environment are run by retried
environment() {
  # Images have other Pythons than 3.11, TPU VMs 3.10, or one without ensurepip.
  { command -v python3.11 >/dev/null && python3.11 -m venv .venv; } || {
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet uv &&
      python3 -m uv venv --quiet --clear --seed --python 3.11 .venv
  }
}

# shellcheck disable=SC2329
install() {
  local pip=".venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps"
  environment && $pip --requirement "$lock" && $pip --editable . && touch "$stamp"
}

installed() { # from the lock, once; fails where there is no Python
  stamp=.venv/installed-$(cksum <"$lock" | cut -d' ' -f1)
  if [ ! -e "$stamp" ]; then
    command -v python3.11 python3 >/dev/null || return 1
    retried install
  fi
}
