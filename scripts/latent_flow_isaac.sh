#!/usr/bin/env bash
# Supervised flows on Isaac3D (FFRL): the published settings; needs Isaac3D_down128/images.
# Environment: SEED (0), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/latent_flow_isaac.sh --device cpu. Results land in
# runs/latent_flow/ of the current folder; the run folder's eval.json holds every metric.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python}" "$root/latent_flow/train_falcol_isaac.py" --tensorboard --isaac --num-support-sets=8 \
    --num-timesteps=8 --batch-size=128 --max-iter="${MAX_ITER:-100000}" --log-freq=10 \
    --data-dir "${DATA_ROOT:-$root/data}" --seed "${SEED:-0}" "$@"
