#!/usr/bin/env bash
# The real weights of SmolLM2-135M-Instruct through WSD on real text, measured along the way:
#
#   bash experiments/conversion/run.sh [FOLDER [FORM]]        (FOLDER: runs/conversion; FORM: cpu, h200 or gpu)
#
# At each kept checkpoint: NELBO per block size with the low-variance estimator, samples, tokens per forward. Writes
# FORM.json and FORM.svg to results/ beside this file and prints the tables. cpu is the reduced form, 51 thousand tokens of the
# Python standard library, for a single core; h200 trains for 5.9 million tokens, what one H200 does in four minutes, of
# the installed packages' sources too; gpu for 249 million tokens, of any .jsonl as well that is put into FOLDER/text
# before. Run again, it goes on where it was. MINUTES (h200, gpu: 9) ends a run after so many, with exit code 75 when
# there is more to do.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs/conversion}
form=${2:-cpu}
begin=$SECONDS
case $form in
  cpu) extras=plot length=128 rows=12 samples=2 minutes=${MINUTES:-600} ;;
  h200) extras=plot,cuda length=1024 rows=64 samples=4 minutes=${MINUTES:-9} ;;
  gpu) extras=plot,cuda length=1024 rows=64 samples=4 minutes=${MINUTES:-9} ;;
  *) echo "error: FORM=$form, expected cpu, h200 or gpu" >&2 && exit 2 ;;
esac
source tools/setup_venv.sh "$extras"
source experiments/common/smollm2.sh
here=experiments/conversion
mkdir -p "$folder/text" "$folder/measured"
JAX_COMPILATION_CACHE_DIR=$(realpath "$folder")/programs
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

note_time() { echo $((SECONDS - begin)) >>"$folder/seconds"; }
limited() { # COMMAND...: for as long as there is time; at SIGTERM the trainer saves and stops
  local left=$((60 * minutes - (SECONDS - begin))) code=124
  if [ "$left" -gt 0 ]; then
    code=0
    timeout --signal=TERM "$left" "$@" || code=$?
  fi
  if [ "$code" = 124 ]; then
    note_time
    echo "$minutes minutes are over: run it again to go on"
    exit 75
  fi
  return "$code"
}
measure() { # STEP CHECKPOINT
  local out=$folder/measured/$1
  [ -e "$out.json" ] || limited python tools/evaluate.py --task=nelbo --checkpoint="$2" --data="$folder/rows" \
    --rows="$rows" --samples="$samples" --block_sizes=1,4,32,full --output="$out.json"
  for block in 4 32; do
    [ -e "$out.block$block.jsonl" ] || limited python tools/generate.py --checkpoint="$2" --input="$here/prompts.jsonl" \
      --gen_length=32 --block_length="$block" --output="$out.block$block.jsonl"
  done
}

import_smollm2 "$folder/ar"
packages=packages
[ "$form" != cpu ] || packages=
pack_stdlib "$folder" "$length" ${packages:+"$packages"}
measure 0 "$folder/ar"
limited python -m llada_jax.train --config="$here/config.py:$form" --workdir="$folder/wsd" \
  --config.init_from="$folder/ar" --config.data.path="$folder/rows"
while read -r step; do
  measure "$step" "$folder/wsd/checkpoints/$step"
done < <(find "$folder/wsd/checkpoints" -mindepth 1 -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' | sort -n)
note_time
python "$here/report.py" "$folder" "$here/results/$form"
