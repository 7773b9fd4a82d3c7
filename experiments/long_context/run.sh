#!/usr/bin/env bash
# Scores against the length of the context, with and without YaRN, as in the paper's Figure 5, on a model of 0.9 M
# parameters that is trained here to find a number in up to 1,000 tokens of filler:
#
#   bash experiments/long_context/run.sh
#
# YaRN doubles the 1,024 positions that it was made for; up to 65,536 it shows what such lengths cost. Run again, it goes
# on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/setup_venv.sh eval,plot
here=experiments/long_context
folder=runs/long_context
mkdir -p "$folder"
[ -e "$folder/long.jsonl" ] || python "$here/data.py" "$folder"
train() { # STAGE LENGTH [FLAGS...]: first in short rows, then in long ones
  python tools/pack_data.py --kind=chat --source="$folder/$1.jsonl" --tokenizer="$folder/tokenizer" --out="$folder/rows_$1" \
    --length="$2" --block_align=1
  python -m llada_jax.train --config="$here/config.py:$1" --workdir="$folder/$1" --config.data.path="$folder/rows_$1" "${@:3}"
}
train short 256 --config.data.tokenizer="$folder/tokenizer"
train long 1024 --config.init_from="$folder/short"
bash "$here/measure.sh" trained "$folder/long" "256 512 1024 1536 2048 4096" 20
bash "$here/measure.sh" cost "$folder/long" "4096 8192 16384 32768 65536" 1 2
