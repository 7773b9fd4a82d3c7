#!/usr/bin/env bash
# Does training of token editing win back what a low threshold costs, and do blocks trained in groups decode together?
#
#   bash experiments/editing/run.sh SEED [FOLDER] [VARIANT...]      (FOLDER: runs/post_training; all variants)
#
# Makes the data and the WSD model of experiments/post_training where FOLDER/SEED has none, trains each variant of config.py
# from it, and answers 500 questions at each threshold. Run again, it goes on where it was. The numbers are in
# experiments/editing/results/SEED.json; `python experiments/editing/report.py` makes the tables of all seeds there.
set -euo pipefail
cd "$(dirname "$0")/../.."
variants=("${@:3}")
set -- "${1:?usage: run.sh SEED [FOLDER] [VARIANT...]}" "${2:-runs/post_training}"
source experiments/post_training/base.sh
here=experiments/editing
if [ ${#variants[@]} = 0 ]; then
  mapfile -t variants < <(cd $here && python -c "from config import VARIANTS; print(*VARIANTS, sep='\n')")
fi
for variant in "${variants[@]}"; do
  step "train_editing_$variant" python -m llada_jax.train --config="$here/config.py:$variant" \
    --workdir="$folder/editing/$variant" --config.data.path="$folder/chats" --config.seed="$seed" \
    --config.init_from="$folder/wsd"
  python "$here/answers.py" --checkpoint="$folder/editing/$variant" --variant="$variant" --results="$here/results/$seed.json"
done
