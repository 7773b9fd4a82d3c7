# shellcheck shell=bash
# Sourced by run.sh here and in experiments/editing, from the root of the repository: the data of a seed, and the model
# that fine-tuning starts from, AR and then WSD. Arguments: SEED [FOLDER [MODEL]], as those of run.sh.
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
