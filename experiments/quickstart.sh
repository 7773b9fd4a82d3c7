#!/usr/bin/env bash
# From a real AR checkpoint to a block-diffusion model that samples: bash experiments/quickstart.sh [FOLDER]
exec bash "$(dirname "$0")/quickstart/run.sh" "$@"
