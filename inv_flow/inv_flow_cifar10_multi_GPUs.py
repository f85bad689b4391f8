"""Inverse-Flow on CIFAR-10 (paper, Table 6: L = 2, K = 16; learning rate / 10 every 25 epochs).

    python inv_flow/inv_flow_cifar10_multi_GPUs.py
    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_cifar10_multi_GPUs.py
    python inv_flow/inv_flow_cifar10_multi_GPUs.py --preset released      the published L = 3, K = 28, SLR, 1x1

Writes runs/inv_flow/cifar10 (see inv_flow/train/experiment.py).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "cifar10",
    "dataset": "cifar10",
    "data_aug": True,
    "num_blocks": 2,
    "block_size": 16,
    "step_epochs": 25,
    "epochs": 200,
    "sample_epochs": 10,
    "n_bins": 10,
    "individual_weights": False,
}
PRESETS = {
    "released": {
        "num_blocks": 3,
        "block_size": 28,
        "activation": "SLR",
        "last_activation": False,
        "actnorm": False,
        "conv1x1": True,
        "order": "TL",
        "batch_size": 128,
        "lr": 0.0001,
        "weight_decay": 1e-7,
    }
}

main = launch.script(__doc__, PRESET, PRESETS)

if __name__ == "__main__":
    sys.exit(run_command(main))
