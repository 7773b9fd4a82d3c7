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
seed=${1:?usage: run.sh SEED [FOLDER [MODEL]]}
model=${3:-tiny}
source tools/setup_venv.sh eval
source experiments/common/smollm2.sh
here=experiments/post_training
folder=${2:-runs/post_training}/$seed
mkdir -p "$folder"
# SmolLM2's tokenizer spends four tokens on a number and has a system prompt: longer rows and answers.
if [ "$model" = tiny ]; then
  tokenizer=$folder/tokenizer length=128 answer_length=32
else
  tokenizer=$folder/ar length=256 answer_length=64
fi

step() { # NAME COMMAND...: runs a command once, and notes how long it took
  [ -e "$folder/$1.done" ] && return
  printf '\n== seed %s: %s\n' "$seed" "$1"
  local begin=$SECONDS
  "${@:2}"
  echo $((SECONDS - begin)) >"$folder/$1.done"
}
pack() { # KIND SOURCE OUT
  python tools/pack_data.py --kind="$1" --source="$folder/$2" --tokenizer="$tokenizer" --out="$folder/$3" \
    --length="$length" "${@:4}"
}
train() { # STAGE ROWS [FLAGS...]
  step "train_$1" python -m llada_jax.train --config="$here/config.py:$1,$model" --workdir="$folder/$1" \
    --config.data.path="$folder/$2" --config.seed="$seed" "${@:3}"
}
answer() { # STAGE BLOCK_LENGTH: accuracy and tokens per forward on the 1,000 questions of the test
  step "answer_$1" python tools/evaluate.py --task=reasoning_gym:number_filtering --checkpoint="$folder/$1" \
    --task_settings="$(python "$here/task.py" settings)" --questions=1000 --seed=1000000007 --gen_length="$answer_length" \
    --block_length="$2" --threshold=0.95 --eos_early_stop --batch=128 --output="$folder/$1.json"
}

if [ "$model" = tiny ]; then
  step data python "$here/task.py" "$folder" "$seed"
else
  step import import_smollm2 "$folder/ar"
  step data python "$here/task.py" "$folder" "$seed" "$tokenizer"
fi
step pack_text pack text text.jsonl text
step pack_chats pack chat chats.jsonl chats --block_align=16
[ "$model" = tiny ] && train ar text --config.data.tokenizer="$tokenizer"
answer ar 1
train wsd text --config.init_from="$folder/ar"
answer wsd 16
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
