"""Inverse-Flow on ImageNet32, L = 2, K = 32, width 256.

python inv_flow/experiments/if_glow_imagenet32.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "if_glow_imagenet32",
    "dataset": "imagenet32",
    "block_size": 32,
    "order": "TL",
    "last_activation": False,
    "actnorm": False,
    "coupling_width": 256,
    "lr": 0.0001,
    "scheduler_name": "Exponential",
    "gamma": 0.99997,
    "epochs": 10000,
    "activation": "Spline",
    "n_bins": 10,
    "tail_bound": 20.0,
    "individual_weights": False,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
