#!/usr/bin/env bash
# Supervised flows on dSprites (an early configuration of the published code: K = 5, T = 6).
# Environment: SEED (0), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/latent_flow_dsprites.sh --device cpu. Results land in
# runs/latent_flow/ of the current folder; the run folder's eval.json holds every metric.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python}" "$root/latent_flow/train_vae_scratch.py" --tensorboard --dsprites --num-support-sets=5 \
    --num-timesteps=12 --batch-size=128 --max-iter="${MAX_ITER:-100000}" --log-freq=100 \
    --data-dir "${DATA_ROOT:-$root/data}" --seed "${SEED:-0}" "$@"
