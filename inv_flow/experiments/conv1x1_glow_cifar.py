"""Glow with 1x1 convolutions on CIFAR-10, L = 2, K = 32.

python inv_flow/experiments/conv1x1_glow_cifar.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "conv1x1_glow_cifar",
    "dataset": "cifar10",
    "data_aug": True,
    "block_size": 32,
    "conv1x1": True,
    "activation": "Identity",
    "scheduler_name": "none",
    "epochs": 10000,
    "warmup_epochs": 10,
    "inv_conv": False,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
