#!/usr/bin/env bash
# A small AR model taken through WSD -> SFT -> CAP -> DPO on a task whose answers can be checked, on CPU:
#
#   bash experiments/post_training/run.sh SEED [FOLDER]        (FOLDER: runs/post_training)
#
# and, from the real weights of SmolLM2-135M, on a machine with an accelerator (four times the steps, thirty-two times the
# tokens per step; --config.mesh.* says how it is split over chips):
#
#   bash experiments/post_training/run.sh SEED FOLDER smollm2_135m
#
# Everything of a seed goes to FOLDER/SEED; run again, it goes on where it was. At the end the numbers are in
# experiments/post_training/results/MODEL/SEED.json, and `python experiments/post_training/report.py` makes the table of all
# seeds there. Side by side, two seeds take a core each: taskset -c 0 bash ... 0 & taskset -c 1 bash ... 1
set -euo pipefail
cd "$(dirname "$0")/../.."
source experiments/post_training/base.sh
for stage in sft sft_single; do
  train "$stage" chats --config.init_from="$folder/wsd"
  answer "$stage" 16
done
for stage in cap sft_longer; do
  train "$stage" chats --config.init_from="$folder/sft"
  answer "$stage" 16
done
# Wrong answers of the model itself, drawn at temperature 1, against the right ones.
step draw python tools/generate.py --checkpoint="$folder/cap" --input="$folder/questions.jsonl" --batch=128 \
  --output="$folder/drawn.jsonl" --temperature=1 --seed="$seed" --gen_length="$answer_length" --block_length=16 --eos_early_stop
step pairs python "$here/pairs.py" "$folder/drawn.jsonl" "$folder/pairs.jsonl"
step pack_pairs pack preference pairs.jsonl pairs --block_align=16
train dpo pairs --config.init_from="$folder/cap"
answer dpo 16
python "$here/report.py" --collect "$folder" "$here/results/$model/$seed.json"
