#!/usr/bin/env bash
# NFPI on CIFAR-100 from a flow pre-trained on ImageNet-32, with attention after the coupling nets.
# WEIGHTS: the pre-trained flow (flow.safetensors, see nfpi/convert_checkpoint.py).
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_cifar100_imagenet_mean.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/cifar100 --config-name=imagenet_mean \
    ++use_attention_after=1 nf_weights_load_path="${WEIGHTS:?set WEIGHTS to the pre-trained flow.safetensors}" "$@"
