#!/usr/bin/env bash
# SFT of a real AR model as a block-diffusion model: bash experiments/smollm2_sft.sh [FOLDER [CHATS.jsonl]]
exec bash "$(dirname "$0")/smollm2_sft/run.sh" "$@"
