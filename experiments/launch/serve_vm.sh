#!/usr/bin/env bash
# Creates a TPU VM of one host and serves a checkpoint on it, from your own machine:
#
#   PROJECT=P ZONE=Z serve_vm.sh NAME TYPE CHECKPOINT KEYS SERVE_FLAGS...
#
# TYPE: v6e-8, v5litepod-8, v5p-8, ... of one host. CHECKPOINT: gs://BUCKET/FOLDER. KEYS: a file of API keys, one a line.
# Run again, it sends the code of HEAD anew to the VM that is there. The VM costs until it is deleted:
#   gcloud compute tpus tpu-vm delete NAME --project=P --zone=Z
# A health check for a balancer of Google's, which has to get through the firewall:
#   gcloud compute health-checks create http llada --project=P --port=8000 --request-path=/health --check-interval=5s
#   gcloud compute firewall-rules create llada-health --project=P --network=default --allow=tcp:8000 \
#     --source-ranges=35.191.0.0/16,130.211.0.0/22
# Not run on Google Cloud yet.
set -euo pipefail
usage="usage: PROJECT=P ZONE=Z serve_vm.sh NAME TYPE CHECKPOINT KEYS SERVE_FLAGS..."
: "${PROJECT:?$usage}" "${ZONE:?$usage}"
name=${1:?$usage} type=${2:?$usage} checkpoint=${3:?$usage} keys=${4:?$usage}
shift 4
bad_input() {
  echo "error: $1" >&2
  exit 2
}
case $type in # cloud.google.com/tpu/docs/runtimes
v6e-*) runtime=v2-alpha-tpuv6e ;;
v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
v5p-*) runtime=v2-alpha-tpuv5 ;;
v4-*) runtime=tpu-ubuntu2204-base ;;
*) bad_input "$type: none of v6e-N, v5litepod-N, v5p-N, v4-N" ;;
esac
[ -s "$keys" ] || bad_input "$keys: no file of keys"

vm() { # VERB ARGUMENTS...
  gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"
}
vm describe "$name" >/dev/null 2>&1 || vm create "$name" --accelerator-type="$type" --version="$runtime" \
  --scopes=https://www.googleapis.com/auth/cloud-platform
git -C "$(dirname "$0")/../.." archive --format=tar.gz HEAD |
  vm ssh "$name" --command='sudo mkdir -p /opt/llada_jax && sudo tar xz -C /opt/llada_jax'
vm scp "$keys" "$name:llada_jax.keys"
vm ssh "$name" --command="cd /opt/llada_jax && sudo bash experiments/launch/serve.sh $(printf '%q ' "$checkpoint")\
~/llada_jax.keys${*:+ $(printf '%q ' "$@")}"
