#!/usr/bin/env bash
# From a real AR checkpoint to a block-diffusion model that samples, in one command, on two CPU cores:
#
#   bash experiments/quickstart.sh [FOLDER]        (FOLDER: runs/quickstart)
#
# Sets up .venv, imports SmolLM2-135M-Instruct, trains a shortened WSD curriculum on the Python standard library,
# reports the held-out NELBO per block size before and after, and samples. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
begin=$SECONDS
step() { printf '\n== %s  [%dm%02ds]\n' "$1" $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)); }

step "1/6 environment"
source tools/setup_venv.sh
source experiments/common/smollm2.sh
folder=${1:-runs/quickstart}
mkdir -p "$folder"

step "2/6 import the AR model: GGUF -> Orbax, one row added for the mask token"
import_smollm2 "$folder/ar"

step "3/6 real text: the sources of the Python standard library, packed into rows of 128 tokens"
pack_stdlib "$folder" 128

step "4/6 before training: held-out loss of the AR model, and NELBO per block size"
echo "(at block size 1 the two-stream diffusion pass must score exactly the AR model's own loss)"
evaluate() { # CHECKPOINT OUTPUT
  [ -e "$2" ] || python tools/evaluate.py --task=nelbo --checkpoint="$1" --data="$folder/rows" --rows=8 \
    --block_sizes=1,4,32,64,128 --output="$2"
}
evaluate "$folder/ar" "$folder/before.json"

step "5/6 train: block size 1 -> 4 -> 32 -> 64 -> 128 -> 64 -> 32"
python -m llada_jax.train --config=experiments/quickstart/config.py --workdir="$folder/wsd" \
  --config.init_from="$folder/ar" --config.data.path="$folder/rows"

step "6/6 after training"
evaluate "$folder/wsd" "$folder/after.json"
python experiments/quickstart/report.py "$folder/before.json" "$folder/after.json"
for block in 4 32; do
  printf '\nsampled by block diffusion, block size %d, threshold 0.3:\n' "$block"
  python tools/generate.py --checkpoint="$folder/wsd" --gen_length=32 --block_length="$block" --threshold=0.3 \
    --prompt='def read(self, size=-1):
    """Read and return up to size bytes'
done

step "done"
cat <<'TEXT'
This was a demonstration: some 30 thousand tokens, where the paper trains on billions. The samples show the machinery,
not a useful model. A longer run, with NELBO, samples and tokens per forward along the way: experiments/conversion/run.sh
TEXT
