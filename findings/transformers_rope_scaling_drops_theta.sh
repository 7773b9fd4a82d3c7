#!/usr/bin/env bash
# transformers 5.24.0 (PyPI): a config.json that it saved holds rope_theta in rope_parameters. With "rope_scaling" added
# to it, as the model cards of Qwen2.5 and Qwen3 say to do for long contexts, the whole of rope_parameters is dropped.
#
# Expected: YaRN by 4 with the model's own rope_theta (1000000), or an error or warning that two fields disagree.
# Seen: rope_theta 10000, the class's default, without a word; every rotation of the model is another one:
#   saved:  {'rope_type': 'default', 'rope_theta': 1000000.0}
#   loaded: {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768, 'rope_theta': 10000.0}
#
# Exits with 0 while it behaves so, with 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json, sys
from transformers import AutoConfig, Qwen3Config

Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}).save_pretrained("model")
saved = json.load(open("model/config.json"))
print("saved: ", saved["rope_parameters"])
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
json.dump(saved | {"rope_scaling": yarn}, open("model/config.json", "w"))
loaded = AutoConfig.from_pretrained("model").rope_parameters
print("loaded:", loaded)
sys.exit(0 if loaded["factor"] == 4.0 and loaded["rope_theta"] == 10000.0 else 1)
PY
