#!/usr/bin/env bash
# NFPI on scikit-learn's digits, minutes on one core: means, lambda 10 000.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_digits_mean.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/digits --config-name=mean "$@"
