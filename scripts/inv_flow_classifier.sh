#!/usr/bin/env bash
# Two 3x3 inverse convolutions (16 parameters) and one linear layer classify MNIST, beside the linear layer alone.
# Environment: SEED (0), DATA_ROOT (<repository>/data), PYTHON (python), OUT (runs/inv_flow). Options go to both runs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
out=${OUT:-runs/inv_flow}
"${PYTHON:-python}" "$root/inv_flow/classify_mnist.py" --seed "${SEED:-0}" --out "$out/classifier" "$@"
exec "${PYTHON:-python}" "$root/inv_flow/classify_mnist.py" --seed "${SEED:-0}" --no_inverse --out "$out/classifier_linear" "$@"
