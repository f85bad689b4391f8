#!/usr/bin/env bash
# Inverse-Flow on ImageNet at 32x32 or 64x64 pixels (L = 2, K = 16), one process a GPU.
# Environment: RESOLUTION (32), GPUS (number of processes on this machine, 1), LAYER (inverse), SEED (0), DATA_ROOT (<repository>/data),
# TORCHRUN (torchrun). Further options are passed on. Results land below the current folder, in runs/inv_flow/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${TORCHRUN:-torchrun}" --standalone --nproc_per_node="${GPUS:-1}" "$root/inv_flow/inv_flow_imagenet_multi_gpu.py" --preset "${RESOLUTION:-32}" \
    --layer "${LAYER:-inverse}" --seed "${SEED:-0}" "$@"
