#!/usr/bin/env bash
# NFPI on MNIST in the size of one CPU core: 500 images a class, 2 steps a level, narrow nets, and CNNs on its samples.
# The figures of nfpi/README.md; the full configuration is nfpi_mnist_mean_and_var.sh.
# Environment: DATA_ROOT (<repository>/data), PYTHON (python). Further options are hydra overrides and are passed on:
#   bash scripts/nfpi_mnist_small.sh device=cpu train.epochs=1
# Results land below the current folder, in outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
exec "${PYTHON:-python}" "$root/nfpi/main.py" --config-path=___configs/mnist --config-name=mean_and_var \
    dataset_info.items_per_class_train=500 dataset_info.items_per_class_val=500 \
    "num_flows=[2,2,2]" "num_blocks=[1,1,1]" "hidden_channels=[32,64,64]" train.batch_size=128 \
    train.epochs="${EPOCHS:-16}" train.warmup_steps=100 test_every_n_epochs=8 save_every_n_epochs=16 \
    train_classifier=0 extra=small "$@"
