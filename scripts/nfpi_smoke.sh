#!/usr/bin/env bash
# NFPI, every stage on a few digits: seconds on a CPU.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_smoke.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/digits --config-name=smoke device=cpu \
    classification.digits.epochs=1 num_imgs_scale=0.1 "$@"
