#!/usr/bin/env bash
# NFPI, the planar experiment: CLOUD is a .npz with x (N, 2) and y (N,), or blobs, rings.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are passed on:
#   bash scripts/nfpi_synthetic_2d.sh --strength 1000
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/synthetic_2d.py" --data "${CLOUD:-blobs}" --out outputs/synthetic_2d "$@"
