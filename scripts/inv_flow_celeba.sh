#!/usr/bin/env bash
# Inverse-Flow on CelebA at 32x32, 64x64 or 128x128 pixels (L = 3, K = 32), one process a GPU.
# Environment: RESOLUTION (64), GPUS (number of processes on this machine, 1), LAYER (inverse), SEED (0), DATA_ROOT (<repository>/data),
# TORCHRUN (torchrun). Further options are passed on. Results land below the current folder, in runs/inv_flow/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${TORCHRUN:-torchrun}" --standalone --nproc_per_node="${GPUS:-1}" "$root/inv_flow/inv_flow_celeba_multi_gpu.py" --preset "${RESOLUTION:-64}" \
    --layer "${LAYER:-inverse}" --seed "${SEED:-0}" "$@"
