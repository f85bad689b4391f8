#!/usr/bin/env bash
# Every metric of a trained run on the official test images (10,000) with the VP score (40,000 pairs).
# Usage: bash scripts/latent_flow_evaluate.sh RUN_FOLDER [options]. Environment: DATA_ROOT, PYTHON (python).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exp=${1:?usage: latent_flow_evaluate.sh RUN_FOLDER [options]}
shift
exec "${PYTHON:-python}" "$root/latent_flow/evaluate.py" --exp "$exp" --split test --images 10000 --vp-pairs 40000 \
    --data-dir "${DATA_ROOT:-$root/data}" "$@"
