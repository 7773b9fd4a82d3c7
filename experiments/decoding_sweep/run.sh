#!/usr/bin/env bash
# Threshold x block size, score and tokens per forward, as in the paper's Figure 4:
#
#   bash experiments/decoding_sweep/run.sh [CHECKPOINT]
#
# CHECKPOINT: a model trained on the task of experiments/post_training; without one, seed 0 of that experiment is run (some
# twenty minutes of two cores; what is there already is used) and its CAP model is swept. Writes
# results/sweep.json and sweep.svg beside this file. Run again, it answers only the pairs that are missing there.
set -euo pipefail
cd "$(dirname "$0")/../.."
checkpoint=${1:-runs/post_training/0/cap}
source tools/setup_venv.sh eval,plot
[ -e "$checkpoint" ] || bash experiments/post_training/run.sh 0
here=experiments/decoding_sweep
python "$here/sweep.py" --checkpoint="$checkpoint" --results="$here/results/sweep.json" \
  --picture="$here/results/sweep.svg" --questions=500 --batch=125
