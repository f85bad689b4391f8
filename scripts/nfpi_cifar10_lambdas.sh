#!/usr/bin/env bash
# NFPI on CIFAR-10 for several lambda, one run after the other (hydra multirun).
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_cifar10_lambdas.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/cifar10 --config-name=mean --multirun \
    val.gmm.fpi_info.lambda_fpi_mu=100000,500000,1000000 \
    val.gmm.fpi_info.lambda_fpi_sigma='${val.gmm.fpi_info.lambda_fpi_mu}' "$@"
