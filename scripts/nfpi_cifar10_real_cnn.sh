#!/usr/bin/env bash
# The CNN of the NFPI comparison, trained on real CIFAR-10 images.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_cifar10_real_cnn.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/cifar10 --config-name=mean \
    train_nf=0 test_nf_alone=0 classifier_nf_strategy=do_not_use extra=real_cnn "$@"
