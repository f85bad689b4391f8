#!/usr/bin/env bash
# NFPI on CIFAR-10: fixed point iteration on the means, lambda 500 000, 500 images a class as shipped.
# All images, as for the published checkpoint: dataset_info.items_per_class_train=0 dataset_info.items_per_class_val=0
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_cifar10_mean.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/cifar10 --config-name=mean "$@"
