#!/usr/bin/env bash
# Inverse-Flow on MNIST with the paper's settings (Table 3: L = 2, K = 16).
# Environment: SEED (0), EPOCHS (100), LAYER (inverse; also none, glow, finc, emerging, convexp, snf, unit), DATA_ROOT
# (<repository>/data), PYTHON (python). Further options are passed on: bash scripts/inv_flow_mnist.sh --device cpu.
# Results land below the current folder, in runs/inv_flow/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
layer=${LAYER:-inverse}
exec "${PYTHON:-python}" "$root/inv_flow/inv_flow_mnist.py" --layer "$layer" --seed "${SEED:-0}" --epochs "${EPOCHS:-100}" \
    --log_timing --name "mnist_${layer}_${SEED:-0}" "$@"
