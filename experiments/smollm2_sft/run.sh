#!/usr/bin/env bash
# SFT of a real AR model as a block-diffusion model, in one command, on two CPU cores:
#
#   bash experiments/smollm2_sft/run.sh [FOLDER [CHATS.jsonl]]        (FOLDER: runs/smollm2_sft)
#
# Imports SmolLM2-135M-Instruct, packs CHATS (JSONL of {"messages": [...]}; by default sums, answered as "The answer is
# 12."), trains LoRA adapters by SFT with complementary masks at block size 8, and asks other questions: how many of the
# answers have the trained format, and how many are right. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/setup_venv.sh eval
source experiments/common/smollm2.sh
folder=${1:-runs/smollm2_sft}
mkdir -p "$folder"

import_smollm2 "$folder/ar"
[ -e "$folder/chats.jsonl" ] || python experiments/smollm2_sft/chats.py "$folder"
python tools/pack_data.py --kind=chat --source="${2:-$folder/chats.jsonl}" --tokenizer="$folder/ar" \
  --out="$folder/rows" --length=128 --block_align=8
python -m llada_jax.train --config=experiments/smollm2_sft/config.py --workdir="$folder/sft" \
  --config.init_from="$folder/ar" --config.data.path="$folder/rows"
python tools/generate.py --checkpoint="$folder/sft" --input="$folder/questions.jsonl" --output="$folder/answers.jsonl" \
  --gen_length=16 --block_length=8 --threshold=0.9 --eos_early_stop
python experiments/smollm2_sft/chats.py --report "$folder/answers.jsonl"
