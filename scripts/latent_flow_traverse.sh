#!/usr/bin/env bash
# Sample ten latent codes of a trained run and traverse them along every flow, with GIFs: the published settings.
# Usage: bash scripts/latent_flow_traverse.sh RUN_FOLDER [options of the traversal, e.g. --compose]
# Environment: POOL (VAE_MNIST_VIS), PYTHON (python). Results land in RUN_FOLDER/results/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exp=${1:?usage: latent_flow_traverse.sh RUN_FOLDER [options]}
shift
"${PYTHON:-python}" "$root/latent_flow/sample_vae.py" --exp "$exp" --num-samples 10 --pool "${POOL:-VAE_MNIST_VIS}"
exec "${PYTHON:-python}" "$root/latent_flow/traverse_latent_space_vae.py" -v --gif --exp="$exp" \
    --pool="${POOL:-VAE_MNIST_VIS}" --eps=1 --shift-steps=16 --shift-leap=1 "$@"
