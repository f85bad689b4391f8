#!/usr/bin/env bash
# NFPI on MNIST: fixed point iteration on means and variances, lambda 1, all images, 300 epochs.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_mnist_mean_and_var.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/mnist --config-name=mean_and_var "$@"
