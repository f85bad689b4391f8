#!/usr/bin/env bash
# Test a CIFAR-10 checkpoint (Bayes' rule), then train a CNN on its samples at T = 1.
# WEIGHTS: flow.safetensors of a finished run, or converted from a published checkpoint.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_cifar10_checkpoint.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/cifar10 --config-name=mean_reload \
    nf_load_path="${WEIGHTS:?set WEIGHTS to flow.safetensors}" extra=ckpt_test num_test_alone=1 only_T=1 T=1.0 "$@"
