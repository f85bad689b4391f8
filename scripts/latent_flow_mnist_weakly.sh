#!/usr/bin/env bash
# Weakly supervised flows on MNIST (FFRL, MNIST table, weak row).
# Environment: SEED (0), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/latent_flow_mnist_weakly.sh --device cpu. Results land in
# runs/latent_flow/ of the current folder; the run folder's eval.json holds every metric.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python}" "$root/latent_flow/train_vae_scratch_weakly.py" --tensorboard --dataset mnist --num-support-sets=3 \
    --num-timesteps=16 --batch-size=128 --max-iter="${MAX_ITER:-90000}" --log-freq=10 \
    --data-dir "${DATA_ROOT:-$root/data}" --seed "${SEED:-0}" "$@"
