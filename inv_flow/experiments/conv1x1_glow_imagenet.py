"""Glow with 1x1 convolutions on ImageNet32, L = 3, K = 48.

python inv_flow/experiments/conv1x1_glow_imagenet.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "conv1x1_glow_imagenet",
    "dataset": "imagenet32",
    "num_blocks": 3,
    "block_size": 48,
    "conv1x1": True,
    "activation": "Identity",
    "batch_size": 64,
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
