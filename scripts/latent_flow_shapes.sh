#!/usr/bin/env bash
# Supervised flows on Shapes3D (FFRL, Shapes3D table): the published settings; needs 3dshapes.h5.
# Environment: SEED (0), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/latent_flow_shapes.sh --device cpu. Results land in
# runs/latent_flow/ of the current folder; the run folder's eval.json holds every metric.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python}" "$root/latent_flow/train_vae_scratch.py" --tensorboard --shapes3d --num-support-sets=5 \
    --num-timesteps=14 --batch-size=128 --max-iter="${MAX_ITER:-100000}" --log-freq=10 \
    --data-dir "${DATA_ROOT:-$root/data}" --seed "${SEED:-0}" "$@"
