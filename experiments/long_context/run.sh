#!/usr/bin/env bash
# Needles in a haystack against the length of the context, with and without YaRN, as in the paper's Figure 5:
#
#   bash experiments/long_context/run.sh NAME CHECKPOINT "CONTEXTS" [QUESTIONS [FACTORS [BLOCK]]]
#
# CONTEXTS in tokens; FACTORS of YaRN ("1 2"; 1 is none); BLOCK of decoding (1: a shifted model is the AR model that it
# came from). Writes results/NAME.json and NAME.svg beside this file and prints the table. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?usage: run.sh NAME CHECKPOINT CONTEXTS [QUESTIONS [FACTORS [BLOCK]]]}
checkpoint=${2:?CHECKPOINT}
read -ra contexts <<<"${3:?CONTEXTS}"
read -ra factors <<<"${5:-1 2}"
source tools/setup_venv.sh eval,plot
here=experiments/long_context
folder=runs/long_context/$name
mkdir -p "$folder"
for context in "${contexts[@]}"; do
  for factor in "${factors[@]}"; do
    out=$folder/$context.yarn$factor.json
    [ -e "$out" ] || python tools/evaluate.py --task=needle --checkpoint="$checkpoint" --context="$context" --seed=1 \
      --questions="${4:-20}" --yarn="$factor" --gen_length=16 --block_length="${6:-1}" --eos_early_stop --batch=4 --output="$out"
  done
done
python "$here/report.py" "$folder" "$here/results/$name"
