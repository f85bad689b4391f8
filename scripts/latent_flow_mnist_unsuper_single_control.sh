#!/usr/bin/env bash
# Unsupervised flows on MNIST, one spike for both field types (STA): the published settings.
# Environment: SEED (0), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/latent_flow_mnist_unsuper_single_control.sh --device cpu. Results land in
# runs/latent_flow/ of the current folder; the run folder's eval.json holds every metric.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python}" "$root/latent_flow/train_vae_scratch_unsuper.py" --tensorboard --dataset mnist --single-control \
    --num-support-sets=3 --num-timesteps=16 --batch-size=128 --max-iter="${MAX_ITER:-90000}" --log-freq=10 \
    --data-dir "${DATA_ROOT:-$root/data}" --seed "${SEED:-0}" "$@"
