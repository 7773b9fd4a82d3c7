#!/usr/bin/env bash
# Does reinforcement learning add right answers to a model that SFT or CAP has taught, and what does it do to its speed?
#
#   bash experiments/reinforcement/run.sh SEED [FOLDER [RUN...]]      (FOLDER: runs/post_training; RUN: sft_elbo, ...)
#
# Takes the models of experiments/post_training in FOLDER/SEED (its run.sh makes them), trains each by both estimators, and
# answers 1,000 questions before and after. Run again, it goes on where it was. The numbers are in
# experiments/reinforcement/results/SEED.json; `python experiments/reinforcement/report.py` makes the table.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:?usage: run.sh SEED [FOLDER [RUN...]]}
folder=${2:-runs/post_training}/$seed
source tools/setup_venv.sh eval
here=experiments/reinforcement
results=$here/results/$seed.json
runs=("${@:3}")
[ ${#runs[@]} = 0 ] && runs=(sft_trajectory sft_elbo cap_trajectory cap_elbo)

answer() { # NAME CHECKPOINT
  python "$here/answers.py" --checkpoint="$2" --name="$1" --results="$results"
}
for run in "${runs[@]}"; do
  start=${run%_*} estimator=${run#*_}
  if [ ! -d "$folder/$start" ]; then
    echo "error: $folder/$start is not there: run experiments/post_training/run.sh $seed first" >&2
    exit 2
  fi
  answer "$start" "$folder/$start"
  python -m llada_jax.train --config="$here/config.py:$estimator" --workdir="$folder/rl/$run" \
    --config.init_from="$folder/$start" --config.seed="$seed"
  answer "$run" "$folder/rl/$run"
done
[ -d "$folder/dpo" ] && answer dpo "$folder/dpo"
python "$here/report.py"
