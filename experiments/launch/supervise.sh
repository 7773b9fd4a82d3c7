#!/usr/bin/env bash
# Runs COMMAND, a training run that resumes, again and again until it has finished:
#
#   supervise.sh FOLDER COMMAND...
#
# Exits 0 when the command has finished and 2 when its input is bad. Any other end (a crash, a hang that its watchdog
# ended, a stop because a peer was taken back) is followed by another start, after a wait that doubles from start to
# start. SUPERVISE_ATTEMPTS starts in a row that fail early end it with the last exit code. SIGTERM is passed on, and
# ends it with 143 when the command has saved and gone. FOLDER/train.log has all that was printed; FOLDER/exit_code says
# how it ended, where it did not end by SIGTERM.
set -uo pipefail
folder=${1:?usage: supervise.sh FOLDER COMMAND...}
shift
first_wait=${SUPERVISE_WAIT:-5}        # seconds before the second start
longest_wait=${SUPERVISE_LONGEST:-300} # between later ones
steady=${SUPERVISE_STEADY:-600}        # a start that lasts so long did not fail early
attempts=${SUPERVISE_ATTEMPTS:-20}

mkdir -p "$folder"
log=$folder/train.log
touch "$log"
rm -f "$folder/exit_code"
child='' told_to_stop=''
stop() {
  told_to_stop=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

say() { printf '%s supervise: %s\n' "$(date -u +%FT%TZ)" "$1" | tee -a "$log"; }

await() { # waits for $child even if a signal comes in between; its exit code is in $code
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
}

finish() { # CODE WORDS
  say "$2"
  [ -n "$told_to_stop" ] || echo "$1" >"$folder/exit_code"
  exit "$1"
}

pause=$first_wait failed=0
while true; do
  [ -z "$told_to_stop" ] || finish 143 "told to stop"
  begin=$SECONDS
  say "starting: $*"
  before=$(stat -c %s "$log")
  "$@" >>"$log" 2>&1 &
  child=$!
  [ -z "$told_to_stop" ] || stop # in between
  tail -c "+$((before + 1))" -f --pid="$child" "$log" &
  show=$!
  await
  wait "$show"
  lasted=$((SECONDS - begin))
  [ -z "$told_to_stop" ] || finish 143 "told to stop; the command ended with $code"
  stopped='' # what every process prints when one of them is told to stop (runtime/preemption.py)
  if tail -c "+$((before + 1))" "$log" | grep '^SIGTERM: saving a checkpoint' >/dev/null; then stopped=yes; fi
  if [ "$code" = 0 ] && [ -z "$stopped" ]; then finish 0 "finished"; fi
  if [ "$code" = 2 ]; then finish 2 "bad input: see the line above"; fi
  if [ -n "$stopped" ] || [ "$lasted" -ge "$steady" ]; then
    pause=$first_wait failed=0
  else
    failed=$((failed + 1))
    [ "$failed" -lt "$attempts" ] || finish "$code" "gave up: $failed starts in a row ended early"
  fi
  say "ended with $code after $lasted s; starting again in $pause s"
  sleep "$pause" &
  child=$!
  await
  pause=$((pause * 2 < longest_wait ? pause * 2 : longest_wait))
done
